"A service loses no question, tells nobody what is not theirs, and ends when it has answered."

import contextlib, http.client, json, os, random, re, shutil, signal, socket
import struct, subprocess, sys, threading, time, zlib

import pandas as pd
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the service needs fastapi")

from cpcl.core import UserError  # noqa: E402
from cpcl.encoder import EncoderConfig, load_encoder, save_encoder  # noqa: E402
from cpcl.search import Index  # noqa: E402
from cpcl.search.live import Ask, Live, image_key  # noqa: E402
from cpcl.search.serving import serve_rest  # noqa: E402
from cpcl.train import make_config  # noqa: E402
from cpcl.train.start import start_run  # noqa: E402

TOKEN = "a-token-that-is-long-enough"
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")


# --- a service, and somebody who asks it


def quiet(line):
    "Nobody listens."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A folder with two dozen plain images, a run and an index."
    tmp = tmp_path_factory.mktemp("serve")
    (tmp / "crops").mkdir()
    for i in range(24):
        Image.new("RGB", (24, 48), (10 * i, 250 - 10 * i, 99)).save(tmp / "crops" / f"{i:02}.png")
    start_run(tmp / "run", make_config("clip"), {})
    save_encoder(load_encoder(EncoderConfig()), tmp / "run" / "last.safetensors")
    cameras = pd.DataFrame({"path": [f"{i:02}.png" for i in range(24)], "camera": [i % 3 for i in range(24)]})
    cameras.to_csv(tmp / "cameras.csv", index=False)
    Index.build(tmp / "crops", tmp / "run", tmp / "index", tmp / "cameras.csv", log=quiet)
    return tmp


@pytest.fixture(scope="module")
def index(base):
    return Index.open(base / "index")


@pytest.fixture(scope="module")
def service(base):
    with serve_rest(base / "index", port=0, token=TOKEN, show=True, block=False) as served:
        yield served


@pytest.fixture
def own(base, tmp_path):
    "A copy of the folder, to be changed, and a service over its index."
    for name in ("crops", "run"):
        shutil.copytree(base / name, tmp_path / name)
    Index.build(tmp_path / "crops", tmp_path / "run", tmp_path / "index", log=quiet)
    with serve_rest(tmp_path / "index", port=0, block=False, every=0.05) as served:
        yield tmp_path, served


class Client:
    "Somebody with a token and one connection."

    def __init__(self, port, token=TOKEN, wait=60):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=wait)
        self.token = token

    def request(self, method, path, body=None, **headers):
        "(status, headers, text)"
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.token:
            headers.setdefault("authorization", f"Bearer {self.token}")
        self.connection.request(method, path, body, headers)
        answer = self.connection.getresponse()
        return answer.status, answer.headers, answer.read().decode("utf8", "replace")

    def post(self, path, /, **body):
        "(status, JSON)"
        status, _, text = self.request("POST", path, json.dumps(body), content_type="application/json")
        return status, json.loads(text)


def client(served, **options):
    return Client(served.door.names.port, **options)


def at_once(count, work):
    "What `work(i)` returns for each of so many threads that start together."
    found, start = [None] * count, threading.Barrier(count)

    def go(i):
        start.wait()
        found[i] = work(i)

    threads = [threading.Thread(target=go, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


# --- nothing is lost


def test_fifty_clients_get_what_one_would(service, index):
    "Each its own list, whoever it was answered together with."
    asked = [dict(text=f"a person in coat {i}", k=1 + i % 5, where={"camera": i % 3}) for i in range(50)]
    for status, found in at_once(50, lambda i: client(service).post("/search", **asked[i])):
        assert status == 200, found
        (result,) = found["results"]
        body = next(a for a in asked if a["text"] == result["query"])
        alone = index.search(body["text"], body["k"], body["where"])
        assert [h["path"] for h in result["hits"]] == list(alone.path)
        assert [h["score"] for h in result["hits"]] == pytest.approx(list(alone.score), abs=2e-4)
        assert {h["columns"]["camera"] for h in result["hits"]} == {str(body["where"]["camera"])}


def test_an_index_that_grows_under_load_loses_no_question(own):
    "It is built again three times while twelve clients ask, and the last image is found afterwards."
    folder, served = own
    stop, lost, asked = threading.Event(), [], []

    def ask(i):
        who = client(served, token="")
        while not stop.is_set():
            status, found = who.post("/search", text=f"a man {i}", k=99)
            asked.append(len(found["results"][0]["hits"]) if status == 200 else 0)
            if status != 200:
                lost.append(found)

    def seen(images):
        end = time.monotonic() + 60
        while images not in asked and time.monotonic() < end:
            time.sleep(0.05)

    def build(i):
        try:
            seen(24)
            for n in range(3):
                Image.new("RGB", (24, 48), (7, 70 * n, 7)).save(folder / "crops" / f"new{n}.png")
                Index.build(folder / "crops", folder / "run", folder / "index", log=quiet)
            seen(27)
        finally:
            stop.set()

    at_once(13, lambda i: ask(i) if i else build(i))
    assert not lost and len(asked) > 12 and {24, 27} <= set(asked) <= {24, 25, 26, 27}, (lost, set(asked))
    _, found = client(served, token="").post("/similar", path="new2.png", k=1)
    assert found["results"][0]["hits"][0]["path"] == "new2.png"


@POSIX
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name)
def test_a_stop_finishes_what_was_asked(base, number):
    "Fifteen requests are on their way when the signal comes; every one is answered."
    command = ["-m", "cpcl.cli", "serve", str(base / "index"), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    port = int(re.search(r"127\.0\.0\.1:(\d+)/", process.stdout.readline())[1])
    texts = [f"a man in coat {i}" for i in range(64)]
    clients = [Client(port, token="") for _ in range(15)]
    for who in clients:
        who.connection.connect()

    def ask(i):
        if i == 15:
            time.sleep(0.3)
            return process.send_signal(number)
        return clients[i].post("/search", text=texts, k=24)

    *answers, _ = at_once(16, ask)
    assert [status for status, _ in answers] == [200] * 15
    assert all(len(r["hits"]) == 24 for _, found in answers for r in found["results"])
    out, err = process.communicate(timeout=60)
    by = "" if number == signal.SIGINT else f" by {number.name}"
    assert (process.returncode, err.strip()) == (128 + number, f"cpcl: stopped{by}"), err


# --- who is answered


def test_without_the_token_there_is_nothing(service, index):
    nobody, wrong, right = (client(service, token=t) for t in ("", "another-token-of-16", TOKEN))
    key = image_key("03.png")
    for method, path in [
        ("GET", "/search?q=a"),
        ("POST", "/similar"),
        ("GET", f"/images/{key}"),
        ("GET", "/x"),
    ]:
        for who in (nobody, wrong):
            status, headers, text = who.request(method, path, "{}" if method == "POST" else None)
            assert (status, headers["www-authenticate"], text.count("\n")) == (401, "Bearer", 1), text
    assert json.loads(nobody.request("GET", "/health")[2]) == {"ready": True}
    about = json.loads(right.request("GET", "/health")[2])
    assert about["images"] == 24 and about["columns"] == ["camera"] and about["stale"] is False
    assert right.request("GET", f"/images/{key}")[1]["content-type"] == "image/jpeg"


def test_only_this_machine_is_answered_under_its_name(service):
    port = service.door.names.port
    for headers, status in [
        (dict(host=f"evil.example:{port}"), 400),
        (dict(host=f"localhost:{port + 1}"), 400),
        (dict(origin="http://evil.example"), 403),
        (dict(host=f"localhost:{port}"), 200),
    ]:
        assert client(service).request("GET", "/search?q=a", **headers)[0] == status
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(b"GET /docs HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 400")


def test_nothing_of_the_machine_is_in_an_answer(service, base, capsys):
    "Neither a path of the disk nor the token, whatever is asked."
    who = client(service)
    texts = [
        who.request("GET", path)[2] for path in ("/docs", "/openapi.json", "/health", "/search?q=a", "/x")
    ]
    for path, body in [
        ("/search", dict(text="a man", where={"camera": "9"})),
        ("/similar", dict(path="../run/last.safetensors")),
        ("/similar", dict(path="00.png")),
    ]:
        texts.append(json.dumps(who.post(path, **body)[1]))
    assert not any(str(base) in text or TOKEN in text for text in texts)
    assert capsys.readouterr() == ("", "")


@POSIX
def test_an_image_that_became_a_link_is_not_served(own, base):
    folder, served = own
    served.close()
    with serve_rest(folder / "index", port=0, show=True, block=False) as shown:
        who, key = client(shown, token=""), image_key("05.png")
        assert who.request("GET", f"/images/{key}")[0] == 200
        (folder / "crops" / "05.png").unlink()
        (folder / "crops" / "05.png").symlink_to(base / "crops" / "06.png")
        status, _, text = who.request("GET", f"/images/{key}")
        assert status == 404 and str(folder) not in text
        for path in ("/images/../run/config.json", "/images/05.png", "/images/%2e%2e%2frun", "/images/"):
            assert who.request("GET", path)[0] in (404, 422), path


# --- what makes no sense


def png(width, height, data=b""):
    "A PNG that claims a size."
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(data)),
    ]
    made = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks + [(b"IEND", b"")]:
        made += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return made


def form(*parts):
    "(content type, body) of a form, from (name, file name or empty, bytes)."
    body = b""
    for name, file, data in parts:
        named = f'; filename="{file}"' if file else ""
        body += (
            f'--XX\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + data + b"\r\n"
        )
    return "multipart/form-data; boundary=XX", body + b"--XX--\r\n"


BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"3",
    b'"text"',
    b"\xff\xfe",
    b'{"text": null}',
    b'{"text": []}',
    b'{"text": [[]]}',
    b'{"text": {"a": 1}}',
    b'{"text": "\\ud800"}',
    b'{"text": "a\\u0000"}',
    b'{"text": "a", "k": 1e999}',
    b'{"text": "a", "k": -1}',
    b'{"text": "a", "k": 1.5}',
    b'{"text": "a", "k": ' + b"9" * 5000 + b"}",
    b'{"text": "a", "where": []}',
    b'{"text": "a", "where": {"": 1}}',
    b'{"text": "a", "where": {"camera": null}}',
    b'{"text": "a", "where": {"camera": {"x": 1}}}',
    b'{"text": "a", "where": {"camera": [[1]]}}',
    b'{"text": "a", "where": {"camera": NaN}}',
    b'{"text": "a", "where": {"camera": "\\ud800"}}',
    b'{"text": "a", "without": [""]}',
    b'{"text": "a", "without": 3}',
    b'{"text": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    b'{"text": "a", "text": 3}',
]


@pytest.mark.parametrize("path", ["/search", "/similar"])
def test_no_body_breaks_a_route(path, service, capsys):
    "Whatever is sent, the answer is one line of JSON and no fault of the service."
    who = client(service)
    seeds = random.Random(0)
    noise = [bytes(seeds.randrange(256) for _ in range(seeds.randrange(200))) for _ in range(20)]
    for body in BODIES + noise:
        body = body.replace(b'"text"', b'"path"') if path == "/similar" else body
        status, _, text = who.request("POST", path, body, content_type="application/json")
        assert status in (200, 400, 404, 422) and text.count("\n") == 1, (body[:99], status, text)
        assert ("results" if status == 200 else "error") in json.loads(text)
    assert capsys.readouterr().err == ""


def test_uploads_have_limits(service, base):
    who = client(service)
    image = (base / "crops" / "07.png").read_bytes()
    kind, body = form(("image", "07.png", image), ("k", "", b"1"), ("where", "", b"camera=1"))
    status, _, text = who.request("POST", "/similar", body, content_type=kind)
    assert (status, json.loads(text)["results"][0]["hits"][0]["path"]) == (200, "07.png")
    for parts, status, words in [
        ([("image", "bomb.png", png(60_000, 60_000))], 422, "bomb.png"),
        ([("image", "large.png", png(6000, 6000))], 422, "25,000,000 pixels"),
        ([("image", "x.svg", b"<svg/>")], 422, "x.svg"),
        ([("image", "x.png", image[:40])], 422, "x.png"),
        ([("image", "", image)], 422, "image"),
        ([("image", "a.png", image)] * 65, 400, "files"),
        ([("image", "a.png", image), ("where", "", b"camera")], 422, "column=value"),
    ]:
        kind, body = form(*parts)
        got, _, text = who.request("POST", "/similar", body, content_type=kind)
        assert (got, text.count("\n")) == (status, 1) and words in json.loads(text)["error"], text
    with socket.create_connection(("127.0.0.1", service.door.names.port)) as raw:
        lines = ["POST /similar HTTP/1.1", "Host: 127.0.0.1:%d" % service.door.names.port]
        lines += [
            f"Authorization: Bearer {TOKEN}",
            f"Content-Type: {kind}",
            f"Content-Length: {12 << 20}",
            "",
            "",
        ]
        raw.sendall("\r\n".join(lines).encode())
        assert raw.recv(65536).startswith(b"HTTP/1.1 413")


def test_more_than_may_wait_is_told_when_to_come_back(base):
    "One request at a time: of ten at once some are refused with a Retry-After; heeding it gets an answer."
    with serve_rest(base / "index", port=0, requests=1, block=False) as served:
        texts, waited = [f"a man {i}" for i in range(64)], []

        def ask(i):
            who = client(served, token="")
            while True:
                body = json.dumps(dict(text=texts))
                status, headers, text = who.request("POST", "/search", body, content_type="application/json")
                if status == 200:
                    return len(json.loads(text)["results"])
                assert status in (429, 503) and int(headers["retry-after"]) > 0, text
                waited.append(status)
                time.sleep(0.05)

        assert at_once(10, ask) == [64] * 10 and waited
        assert client(served, token="").request("GET", "/health")[0] == 200


# --- an index on a server of vectors


@pytest.fixture
def lite(base, tmp_path):
    "An index in Milvus Lite."
    pytest.importorskip("milvus_lite")
    at = f"milvus:{tmp_path / 'g.db'}"
    return Index.build(
        base / "crops", base / "run", tmp_path / "index", base / "cameras.csv", store=at, log=quiet
    )


@pytest.mark.slow
def test_an_index_on_a_server_answers_alike(lite, index, tmp_path):
    with Live(tmp_path / "index") as live:
        asks = [
            Ask("a man", k=5),
            Ask("a man", k=9, where={"camera": 1}),
            Ask(image="04.png", k=3),
            Ask(image="x"),
        ]
        *found, missing = live.ask(asks).result(60)
        for ask, (hits, _) in zip(asks, found):
            alone = index.search(ask.text or None, ask.k, ask.where, ask.image)
            assert [h["score"] for h in hits] == pytest.approx(list(alone.score), abs=2e-4)
            assert {h["path"] for h in hits} == set(alone.path)
        assert isinstance(missing, UserError)
        assert [live.keys.path(image_key(p)) for p in ("04.png", "x")] == ["04.png", None]


@pytest.mark.slow
def test_a_collection_that_is_dropped_is_looked_for_again(lite, base, tmp_path):
    "Weights change: the build writes another collection and drops the old one, and no question is lost."
    with Live(tmp_path / "index", every=60) as live:  # nobody looks at the manifest in between
        assert len(live.ask([Ask("a man", k=5)]).result(60)[0].hits) == 5
        shutil.copytree(base / "run", tmp_path / "run")
        encoder = load_encoder(EncoderConfig())
        encoder.clip.logit_scale.data += 1
        save_encoder(encoder, tmp_path / "run" / "last.safetensors")
        before = live.index.store.collection
        Index.build(
            base / "crops",
            tmp_path / "run",
            tmp_path / "index",
            store=f"milvus:{lite.manifest.store}",
            log=quiet,
        )
        assert not live.index.store.exists()
        assert len(live.ask([Ask("a man", k=5)]).result(60)[0].hits) == 5
        assert live.index.store.collection != before


# --- the commands


def command(*words, **options):
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | options
    return subprocess.Popen([sys.executable, "-m", "cpcl.cli", *map(str, words)], **options)


@pytest.mark.slow
def test_a_service_that_cannot_start_is_one_line(base, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cases = {
            ("--port", taken.getsockname()[1]): "Address already in use",
            ("--host", "0.0.0.0"): "CPCL_TOKEN",
            ("--host", "192.0.2.7", "--anyone"): "cannot start the service",
            ("--token", "short"): "16 characters",
            ("--folder", tmp_path / "none"): "is not a folder",
        }
        running = {words: command("serve", base / "index", *words) for words in cases}
        for words, process in running.items():
            out, err = process.communicate(timeout=120)
            assert (process.returncode, out, err.count("\n")) == (2, "", 1), err
            assert cases[words] in err and "short" not in err.partition("16")[0], err


@pytest.mark.slow
def test_queries_go_through_a_pipe(base):
    "As in `cat ids.csv | cpcl search INDEX --queries - --json`."
    words = ("search", base / "index", "--queries", "-", "-k", "2", "--json", "--where", "camera=1")
    process = command(*words, stdin=subprocess.PIPE)
    out, err = process.communicate("id,query\nx,a man\ny,a woman\n", timeout=120)
    lines = [json.loads(line) for line in out.splitlines()]
    assert process.returncode == 0 and "cpcl:" not in err and "note:" not in err, err  # perhaps a bar
    assert [(r["query_id"], r["query"], len(r["hits"])) for r in lines] == [
        ("x", "a man", 2),
        ("y", "a woman", 2),
    ]


@POSIX
@pytest.mark.slow
def test_a_stopped_search_leaves_the_old_hits(base, tmp_path):
    hits = tmp_path / "hits.csv"
    hits.write_text("old")
    process = command("search", base / "index", "--queries", "-", "--out", hits, stdin=subprocess.PIPE)
    with contextlib.suppress(BrokenPipeError):
        for i in range(2000):
            process.stdin.write(f"a man {i}\n")
        process.stdin.flush()
        end = time.monotonic() + 60
        while not list(tmp_path.glob(".cpcl-part*")) and time.monotonic() < end:
            time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in err, err
    assert hits.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["hits.csv"]
