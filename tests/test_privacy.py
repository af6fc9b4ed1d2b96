"The search page keeps nothing, answers nobody else, and lets nobody keep the others waiting."

import asyncio, contextlib, html, http.client, json, os, re, select, signal, socket
import stat, subprocess, sys, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio")

from cpcl.encoder import EncoderConfig, load_encoder, save_encoder  # noqa: E402
from cpcl.search import Index, serve  # noqa: E402
from cpcl.search.app import MOST, Server, _protocol, listen  # noqa: E402
from cpcl.search.private import PRIVATE, sweep  # noqa: E402
from cpcl.search.visitors import Attempts, Line  # noqa: E402
from cpcl.train import make_config  # noqa: E402
from cpcl.train.start import start_run  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PASSWORD, QUERY = "correct horse battery", "a woman in a vermilion coat"
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and owners of folders are POSIX's")


# --- a page, and somebody who asks it


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    "An index of two dozen plain images."
    tmp = tmp_path_factory.mktemp("privacy")
    (tmp / "crops").mkdir()
    for i in range(24):
        Image.new("RGB", (24, 48), (10 * i, 250 - 10 * i, 99)).save(tmp / "crops" / f"{i:02}.png")
    start_run(tmp / "run", make_config("clip"), {})
    save_encoder(load_encoder(EncoderConfig()), tmp / "run" / "last.safetensors")
    return Index.build(tmp / "crops", tmp / "run", tmp / "index", log=lambda line: None)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    "The temporary folder of this test alone."
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    return tmp_path / "tmp"


class Visitor:
    "Somebody who asks a page."

    def __init__(self, port, source="127.0.0.1", host=None):
        self.port, self.source, self.host, self.cookie = port, source, host or f"127.0.0.1:{port}", ""

    def request(self, method, path, body=None, wait=60, **headers):
        "(status, headers, body)"
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.port, timeout=wait, source_address=(self.source, 0)
        )
        try:
            connection.putrequest(method, path, skip_host=True)
            headers = {"Host": self.host, "Cookie": self.cookie} | {
                k.replace("_", "-"): v for k, v in headers.items()
            }
            if body is not None:
                headers["Content-Length"] = str(len(body))
            for name, value in headers.items():
                if value:
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def log_in(self, password=PASSWORD, wait=60):
        "The status of an attempt; the cookie is kept if it succeeds."
        body = f"password={password}".replace(" ", "+").encode()
        return self._with_cookie(self.request("POST", "/login", body, wait))

    def open(self):
        "The status of the page itself; its cookie is kept."
        return self._with_cookie(self.request("GET", "/"))

    def _with_cookie(self, answer):
        "The status of an answer, whose cookie is kept if it has one."
        status, headers, _ = answer
        if cookie := {k.lower(): v for k, v in headers.items()}.get("set-cookie"):
            self.cookie = cookie.partition(";")[0]
        return status

    def call(self, data, fn=None, wait=60, event=None):
        "(status, answer) of an action of the page; of the search if none is named."
        if fn is None:
            config = json.loads(self.request("GET", "/config")[2])
            fn = next(d["id"] for d in config["dependencies"] if len(d["inputs"]) == 4)
        body = dict(data=data, fn_index=fn, session_hash="abc", event_data=event, trigger_id=None)
        text = json.dumps(body).encode()
        status, _, answer = self.request(
            "POST", "/gradio_api/run/predict", text, wait, Content_Type="application/json"
        )
        return status, json.loads(answer) if answer.startswith(b"{") else {}

    def ask(self, sentence, upload=None, wait=60):
        "(pictures, line) of a search."
        status, answer = self.call([upload, sentence, "", 5], wait=wait)
        assert status == 200, (status, answer)
        text = answer["data"][4]
        line = html.unescape(re.search('<p id="line"[^>]*>(.*?)</p>', text)[1])
        return re.findall('<img src="([^"]*)"', text), line

    def upload(self, content):
        "Send a file as the page does; returns what names it."
        head = 'Content-Disposition: form-data; name="files"; filename="face.png"\r\nContent-Type: image/png'
        body = f"--x\r\n{head}\r\n\r\n".encode() + content + b"\r\n--x--\r\n"
        form = "multipart/form-data; boundary=x"
        status, _, answer = self.request("POST", "/gradio_api/upload", body, Content_Type=form)
        assert status == 200, (status, answer)
        return {"path": json.loads(answer)[0], "meta": {"_type": "gradio.FileData"}}


def files(folder):
    "Every file below a folder, without marks."
    return [p for p in Path(folder).rglob("*") if p.is_file() and p.name != ".cpcl"]


# --- what is kept


def test_a_search_leaves_nothing_behind(index, scratch, promise, capfd):
    "Pictures never touch the disk, an upload waits in a private folder, and the end removes it."
    photo = (Path(index.manifest.folder) / "03.png").read_bytes()
    with serve(index, port=0, block=False) as page:
        folder = PRIVATE.path
        assert folder.parent == scratch and stat.S_IMODE(folder.stat().st_mode) == 0o700
        visitor = Visitor(page.names.port)
        pictures, line = visitor.ask(QUERY)
        assert len(pictures) == 5 and "5 images" in line
        assert all(picture.startswith("data:image/jpeg;base64,") for picture in pictures)
        assert files(scratch) == []
        upload = visitor.upload(photo)
        assert [p.read_bytes() for p in files(scratch)] == [photo]
        assert len(visitor.ask("", upload)[0]) == 5 and len(files(scratch)) == 1
        sweep(folder, 0)
        assert files(scratch) == [] and "choose the image again" in visitor.ask("", upload)[1]
        visitor.upload(photo)
    assert list(scratch.iterdir()) == []
    said = capfd.readouterr()
    assert "vermilion" not in said.out + said.err
    promise("The search page leaves no picture, upload or query on the disk", 6)


def test_what_gradio_remembers_of_a_visitor(index, scratch, promise):
    "The question and the pictures are dropped when the answer is sent."
    with serve(index, port=0, block=False) as page:
        Visitor(page.names.port).ask(QUERY)
        sessions = [s for s in _sessions(page) if s.config_values]
        assert sessions
        held = json.dumps([s.config_values for s in sessions], default=str)
        assert "vermilion" not in held and "data:image/jpeg" not in held
    promise("The search page leaves no picture, upload or query on the disk")


def _sessions(page):
    "What Gradio holds of the visitors of a page."
    return list(_gradio(page).state_holder.session_data.values())


def _gradio(page):
    "Gradio's application behind the gate."
    app = page._server.server.config.app.app
    return next(route.app for route in app.routes if hasattr(getattr(route, "app", None), "state_holder"))


WRONG = [
    ("too few values", [QUERY]),
    ("too many values", [None, QUERY, "", 5, QUERY, QUERY]),
    ("other types", [QUERY, {"a": QUERY}, [QUERY], QUERY]),
    ("a nested list", [None, [[QUERY]], "", 5]),
    ("a file elsewhere", [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, QUERY, "", 5]),
    ("no file", [{"path": 7, "url": QUERY}, QUERY, "", 5]),
]


def test_no_query_in_any_log(index, scratch, promise, capfd):
    "Calls of a stale page, of a program, and of a search that fails are logged without what they hold."
    with serve(index, port=0, block=False) as page:
        visitor = Visitor(page.names.port)
        for what, data in WRONG:
            status, answer = visitor.call(data)
            assert status in (200, 500), what
            assert "root:" not in json.dumps(answer), what
        assert visitor.call([QUERY], fn=999)[0] == 500
        assert visitor.request("POST", "/gradio_api/run/predict", QUERY.encode())[0] in (422, 500)
        visitor.request("GET", "/?q=" + QUERY.replace(" ", "+"))
        with mock.patch.object(Index, "search", side_effect=RuntimeError(QUERY)):
            assert "The search failed" in visitor.ask(QUERY)[1]
    said = capfd.readouterr()
    assert "RuntimeError at" in said.err and "a call failed" in said.err
    assert "vermilion" not in said.out + said.err and "Traceback" not in said.err
    promise("No query of the search page reaches a log", len(WRONG) + 4)


def test_the_page_fetches_nothing(index, scratch, promise):
    "A visitor cannot have the server fetch an address, as Gradio does for a value that looks like a file."
    url = "http://search.example.org/x.png"
    file = {"path": url, "url": url, "meta": {"_type": "gradio.FileData"}}
    fetch = mock.AsyncMock(return_value="x.png")
    with mock.patch("gradio.processing_utils.async_ssrf_protected_download", fetch):
        with serve(index, port=0, block=False) as page:
            visitor = Visitor(page.names.port)
            for data in ([file, "", "", 5], [None, file, "", 5], [None, "", [file], 5]):
                assert visitor.call(data)[0] == 500
            config = json.loads(visitor.request("GET", "/config")[2])
            acts = {d["targets"][0][1]: (d["id"], len(d["inputs"])) for d in config["dependencies"]}
            for name in (
                "/etc/passwd",
                "../run/config.json",
                file,
                url,
                {"path": "/etc/passwd"},
                [file],
                None,
            ):
                for act, do in (("select", "like"), ("select", "again"), ("expand", "")):
                    fn, n = acts[act]
                    event = {"do": do, "picture": name, "right": [name], "wrong": [name]}
                    status, answer = visitor.call(["", "", "", 5][:n], fn, event=event)
                    text = json.dumps(answer)
                    assert status in (200, 500) and "data:image" not in text and "root:" not in text, name
    assert fetch.mock_calls == []
    promise("The search page fetches nothing that a visitor names", 3 + 21)


# --- who is answered


def test_only_its_own_name(index, scratch, promise):
    "A site whose name suddenly means 127.0.0.1 gets nothing (DNS rebinding), on no route."
    with serve(index, port=0, block=False) as page:
        port, cases = page.names.port, 0
        for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}"):
            assert Visitor(port, host=host).request("GET", "/")[0] == 200
        hosts = [
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1",
            f"127.0.0.1:{port + 1}",
            f"0.0.0.0:{port}",
            "a b",
        ]
        routes = [
            ("GET", "/"),
            ("GET", "/config"),
            ("GET", "/gradio_api/heartbeat/x"),
            ("POST", "/gradio_api/upload"),
        ]
        routes += [
            ("POST", "/gradio_api/run/predict"),
            ("POST", "/login"),
            ("OPTIONS", "/"),
            ("GET", "/assets/x.js"),
        ]
        for host in hosts:
            for method, path in routes:
                assert Visitor(port, host=host).request(method, path)[0] == 400, (host, path)
                cases += 1
        assert _upgrade(port, "evil.example") == 400
        assert _upgrade(port, f"127.0.0.1:{port}") in (403, 404, 426)
    promise("The search page answers only to its own name and to itself", cases + 5)


def _upgrade(port, host):
    "The status of an attempt to open a websocket."
    with socket.create_connection(("127.0.0.1", port), timeout=20) as s:
        keys = (
            "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: e=="
        )
        s.sendall(f"GET /queue/join HTTP/1.1\r\nHost: {host}\r\n{keys}\r\n\r\n".encode())
        return int(s.recv(100).split()[1])


def test_only_its_own_site(index, scratch, promise):
    "Another site in the operator's browser cannot ask."
    with serve(index, port=0, block=False) as page:
        port = page.names.port
        visitor = Visitor(port)
        origins = [
            "http://evil.example",
            f"http://localhost.evil:{port}",
            "null",
            f"http://127.0.0.1:{port + 1}",
            "",
        ]
        for origin in origins[:-1]:
            for method, path in (
                ("POST", "/gradio_api/run/predict"),
                ("POST", "/gradio_api/upload"),
                ("OPTIONS", "/"),
            ):
                status, headers, _ = visitor.request(method, path, Origin=origin)
                assert status == 403 and "access-control-allow-origin" not in {k.lower() for k in headers}
        assert visitor.request("GET", "/config", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="cors")[0] == 403
        assert visitor.request("GET", "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200
        assert visitor.request("GET", "/config", Origin=f"http://127.0.0.1:{port}")[0] == 200
    promise("The search page answers only to its own name and to itself", 15)


def test_a_name_that_only_a_proxy_knows(index, scratch, monkeypatch, promise):
    "CPCL_HOSTS lists it, and since others can reach the page then, there must be a password."
    monkeypatch.setenv("CPCL_HOSTS", "search.example.org")
    with serve(index, port=0, password=PASSWORD, block=False) as page:
        proxied = Visitor(page.names.port, host="search.example.org")
        assert proxied.request("GET", "/")[0] == 401 and proxied.log_in() == 303
        secure = dict(X_Forwarded_Proto="https", Origin="https://search.example.org")
        status, _, text = proxied.request("GET", "/", **secure)
        assert status == 200 and b"https://search.example.org" in text
        assert Visitor(page.names.port, host="other.example.org").request("GET", "/")[0] == 400
    promise("The search page answers only to its own name and to itself", 4)


def test_the_names_of_this_machine(index, scratch, promise):
    "Behind --host the page answers to the machine's own names and to the address it was reached at."
    with serve(index, host="0.0.0.0", port=0, password=PASSWORD, block=False) as page:
        port, name = page.names.port, socket.gethostname()
        for host in (name, f"{name.partition('.')[0]}.local", "127.0.0.1", "localhost"):
            assert Visitor(port, host=f"{host}:{port}").log_in() == 303
        for host in ("evil.example", "192.0.2.7", f"{name}.evil.example"):
            assert Visitor(port, host=f"{host}:{port}").log_in() == 400
        assert Visitor(port, host=name).request("GET", "/")[0] == 400
    promise("The search page answers only to its own name and to itself", 8)


def _paths(app):
    "Every (method, path) that an application of FastAPI answers, its parameters filled in."
    found, waiting = set(), list(app.routes)
    for route in waiting:
        if included := getattr(route, "original_router", None):  # of newer versions of FastAPI
            waiting.extend(included.routes)
        for method in getattr(route, "methods", None) or ():
            found.add((method, re.sub(r"{\w+(:path)?}", "x", route.path) or "/"))
    return sorted(found)


def test_everything_is_behind_the_login(index, scratch, promise, capfd):
    "Whatever Gradio offers answers 401 to who did not log in, and most of it 404 to who did."
    with serve(index, port=0, password=PASSWORD, block=False) as page:
        stranger, visitor = Visitor(page.names.port), Visitor(page.names.port)
        paths = _paths(_gradio(page))
        needed = {
            "/gradio_api/reset",
            "/gradio_api/cancel",
            "/gradio_api/openapi.json",
            "/config",
            "/gradio_api/info",
        }
        assert needed <= {path for _, path in paths} and len(paths) > 60
        for method, path in paths:
            if (method, path) != ("POST", "/login"):
                assert stranger.request(method, path)[0] == 401, (method, path)
        assert visitor.log_in("wrong") == 401 and visitor.log_in() == 303
        assert len(visitor.ask(QUERY)[0]) == 5
        hidden = [
            p
            for p in paths
            if re.search(r"openapi|docs|info|proxy|file|queue|call|monitoring|component", p[1])
        ]
        for method, path in hidden:
            assert visitor.request(method, path)[0] == 404, (method, path)
    promise("Everything of the search page is behind its password", len(paths) + len(hidden))


def test_uploads_are_bounded(index, scratch, promise):
    "More than ten megabytes, in one file or in many, are refused while they come."
    with serve(index, port=0, block=False) as page:
        visitor, form = Visitor(page.names.port), "multipart/form-data; boundary=x"
        head = 'Content-Disposition: form-data; name="files"; filename="face.png"'
        part = f"--x\r\n{head}\r\n\r\n".encode() + bytes(4 << 20) + b"\r\n"
        status, _, _ = visitor.request(
            "POST", "/gradio_api/upload", part * 3 + b"--x--\r\n", Content_Type=form
        )
        assert status == 413
        assert visitor.request("POST", "/gradio_api/run/predict", bytes(2 << 20))[0] == 413
        assert _unannounced(page.names.port, 20) == 413
        assert sum(p.stat().st_size for p in files(scratch)) < 12 << 20
        with mock.patch("cpcl.search.app.held_bytes", return_value=1 << 40):
            assert (
                visitor.request(
                    "POST", "/gradio_api/upload", part[:99] + b"\r\n--x--\r\n", Content_Type=form
                )[0]
                == 503
            )
    promise("Uploads to the search page are bounded", 4)


def _unannounced(port, n):
    "The status of an upload of so many megabytes in as many files that does not say how large it is."
    with socket.create_connection(("127.0.0.1", port), timeout=20) as s:
        how = "Transfer-Encoding: chunked\r\nContent-Type: multipart/form-data; boundary=x"
        s.sendall(f"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{how}\r\n\r\n".encode())
        head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="face.png"\r\n\r\n'
        part = head + bytes(1 << 20) + b"\r\n"
        with contextlib.suppress(OSError):  # the page hangs up before the end
            for body in [part] * n + [b"--x--\r\n", b""]:
                s.sendall(f"{len(body):x}\r\n".encode() + body + b"\r\n")
        return int(s.recv(100).split()[1])


# --- nobody keeps the others waiting


FLOOD = "one of three hundred"


@pytest.fixture
def held_search(monkeypatch):
    "(line, searched, go): the line of the page, what was searched for, and what a flood waits for."
    search, place, go = Index.search, Line.place, threading.Event()
    line, searched = [], []

    def held(self, query, *args, **kwargs):
        assert query != FLOOD or go.wait(120)
        searched.append(query)
        return search(self, query, *args, **kwargs)

    monkeypatch.setattr(Index, "search", held)
    monkeypatch.setattr(Line, "place", lambda self, client: line.append(self) or place(self, client))
    yield line, searched, go
    go.set()


def until(holds):
    "Wait for something, a minute at most."
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def flood(port, n, source):
    "So many questions at once, whose answers nobody reads."
    body = json.dumps(
        dict(data=[None, FLOOD, "", 5], fn_index=_search_fn(port), session_hash="flood")
    ).encode()
    head = f"POST /gradio_api/run/predict HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
    head += "Content-Type: application/json\r\n"
    sockets = []
    for _ in range(n):
        s = socket.create_connection(("127.0.0.1", port), timeout=20, source_address=(source, 0))
        s.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        sockets.append(s)
    return sockets


def status_of(s):
    "The status that a socket receives, 0 if the page has closed it because there were too many."
    with s:
        try:
            return int(s.recv(64).split()[1])
        except (ConnectionResetError, IndexError):
            return 0


def _search_fn(port):
    "The number of the search among Gradio's functions."
    config = json.loads(Visitor(port).request("GET", "/config")[2])
    return next(d["id"] for d in config["dependencies"] if len(d["inputs"]) == 4)


def can_use(address):
    "Whether this machine can speak from an address."
    with contextlib.suppress(OSError), socket.create_server((address, 0)):
        return True
    return False


@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.2"])
def test_one_client_cannot_starve_the_others(index, scratch, held_search, source, promise):
    "Of three hundred unread questions of one client four are searched for; a browser waits for one of them."
    if not can_use(source):
        pytest.skip("no second loopback address")
    line, searched, go = held_search
    with serve(index, port=0, block=False) as page, ThreadPoolExecutor(1) as pool:
        port, n = page.names.port, 300
        browser = Visitor(port)
        browser.open()
        browser.ask(QUERY)
        sockets, share = flood(port, n, source), 4
        until(lambda: len(select.select(sockets, [], [], 0)[0]) == n - share)  # the others are answered
        asked = pool.submit(browser.ask, QUERY)
        until(lambda: len(line[0].tickets) == share + 1)
        go.set()
        assert len(asked.result(60)[0]) == 5
        statuses = [status_of(s) for s in sockets]
        assert searched == [QUERY, FLOOD, QUERY] + [FLOOD] * (share - 1)
        assert set(statuses) <= {200, 429, 0}, statuses
        assert statuses.count(0) <= n - MOST + 20, statuses.count(0)
    promise("One client of the search page cannot starve the others", n)


@pytest.fixture
def waiting_page(monkeypatch):
    "(wait_in_line, connect, release): a page for four connections of a sender; a line waits for `release()`."
    for name, value in dict(MOST=4, ROOM_SECONDS=60).items():
        monkeypatch.setitem(_protocol.__globals__, name, value)
    go, asked = threading.Event(), threading.Semaphore(0)

    async def app(scope, receive, send):
        "Lets those who ask for /flood wait, refuses them in the end, and answers others at once."
        flood = scope["path"] == "/flood"
        if flood:
            asked.release()
        while flood and not go.is_set():
            await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 429 if flood else 200})
        await send({"type": "http.response.body", "body": b"answered"})

    def connect():
        "A socket to the page; it waits 20 seconds for what it reads."
        return socket.create_connection(sock.getsockname(), timeout=20)

    def wait_in_line(n):
        "n connections whose questions have reached the page and are not answered."
        sockets = []
        for _ in range(n):
            sockets.append(connect())
            sockets[-1].sendall(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
            assert asked.acquire(timeout=20)  # or the next one would close it as idle
        return sockets

    sock = listen("127.0.0.1", 0)
    server = Server(app, sock)
    server.start()
    yield wait_in_line, connect, go.set
    go.set()
    server.close()


def test_refusals_that_are_not_yet_written_close_nobody(waiting_page):
    "Where every connection of an address waits, the next one waits with them and is not closed."
    wait_in_line, connect, release = waiting_page
    flood = wait_in_line(4)
    with connect() as browser:
        time.sleep(0.3)  # the page looks once more
        release()
        browser.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200" in browser.recv(64)
    assert sum(status_of(s) == 0 for s in flood) <= 1  # the oldest made room


def test_nobody_waits_for_room_without_end(waiting_page, monkeypatch):
    "One too many is closed after a while where nothing is answered, and at once where as many again wait."
    wait_in_line, connect, _ = waiting_page
    monkeypatch.setitem(_protocol.__globals__, "ROOM_SECONDS", 1)
    flood, start = wait_in_line(4), time.monotonic()
    assert status_of(connect()) == 0
    assert time.monotonic() - start > 0.9
    monkeypatch.setitem(_protocol.__globals__, "ROOM_SECONDS", 60)  # longer than this test reads
    more = wait_in_line(4)
    assert status_of(connect()) == 0
    for s in more:  # these still wait
        s.setblocking(False)
        with pytest.raises(BlockingIOError):
            s.recv(1)
    for s in (*flood, *more):
        s.close()


@pytest.mark.skipif(not can_use("127.0.0.2"), reason="no second loopback address")
def test_wrong_passwords_are_slowed(index, scratch, promise, monkeypatch):
    "Of sixty wrong passwords at once three are looked at, ten wait, and others do not wait."
    enter = Attempts.enter  # half a second and more is for ever here
    monkeypatch.setattr(Attempts, "enter", lambda *who: enter(*who) and 3600)
    with serve(index, port=0, password=PASSWORD, block=False) as page:
        port, statuses = page.names.port, []
        inside = Visitor(port, source="127.0.0.2")
        assert inside.log_in() == 303

        def guess():
            with contextlib.suppress(OSError, http.client.HTTPException):
                statuses.append(Visitor(port).log_in("wrong password"))

        threads = [threading.Thread(target=guess) for _ in range(60)]
        for t in threads:
            t.start()
        until(lambda: sum(t.is_alive() for t in threads) <= 10)
        assert statuses.count(401) == 3 and set(statuses) == {401, 429}, statuses
        assert len(inside.ask(QUERY)[0]) == 5
        assert Visitor(port, source="127.0.0.3").log_in() == 303
        assert inside.request("GET", "/config")[0] == 200
        assert sum(t.is_alive() for t in threads) >= 7  # the first three may still take three places of ten
    for t in threads:
        t.join(30)
    promise("Wrong passwords of the search page are slowed down", 60)


# --- however it ends

PROGRAM = """
import sys
from unittest import mock
from cpcl.search.app import serve
class Stub:
    columns, encoder, manifest = [], None, mock.Mock(folder="/")
    def __len__(self): return 3
serve(Stub(), port=0)
"""


@contextlib.contextmanager
def running(tmp, program=PROGRAM, powerless=False, **env):
    "A page in a process of its own; yields (process, port)."
    plain = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("GRADIO_")}
    env = plain | dict(TMPDIR=str(tmp), PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1") | env
    extra = dict(preexec_fn=without_powers) if powerless else {}
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=env, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **extra,
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        port = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
        assert port, line + process.communicate(timeout=30)[1]
        yield process, int(port[1])
    finally:
        process.kill()
        process.communicate()


def hold_an_upload(tmp, port):
    "A photograph that waits in the folder of a page."
    Visitor(port).upload(b"a face")
    (held,) = [p for p in files(tmp) if p.read_bytes() == b"a face"]
    return held


def ended(process):
    "(exit status, what it said on stderr)."
    _, said = process.communicate(timeout=60)
    return process.returncode, said


@POSIX
def test_a_stopped_page_leaves_nothing(tmp_path, promise):
    with running(tmp_path) as (process, port):
        hold_an_upload(tmp_path, port)
        process.send_signal(signal.SIGTERM)
        status, said = ended(process)
    assert (status, said) == (143, "cpcl: the page was stopped\n")
    assert list(tmp_path.iterdir()) == []
    promise("A stopped search page leaves no file")


@POSIX
@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGHUP, 129), (signal.SIGINT, -signal.SIGINT)])
def test_a_page_that_ends_otherwise_leaves_nothing(tmp_path, number, status, promise):
    with running(tmp_path) as (process, port):
        hold_an_upload(tmp_path, port)
        process.send_signal(number)
        assert ended(process)[0] == status
    assert list(tmp_path.iterdir()) == []
    promise("A stopped search page leaves no file")


@POSIX
@pytest.mark.slow
def test_the_next_page_removes_what_a_killed_one_left(tmp_path, promise):
    with running(tmp_path) as (killed, port), running(tmp_path) as (living, other):
        left, kept = hold_an_upload(tmp_path, port), PROGRAM
        killed.kill()
        killed.wait()
        Visitor(other).upload(b"another face")
        assert left.exists()
        with running(tmp_path) as (process, _):
            assert not left.exists() and not left.parent.parent.exists()
            (kept,) = files(tmp_path)
            assert kept.read_bytes() == b"another face"  # of the page that still runs
            process.terminate()
            process.wait()
        living.terminate()
        living.wait()
    assert list(tmp_path.iterdir()) == []
    promise("A killed search page's files are removed by the next")


@POSIX
@pytest.mark.slow
def test_the_command_says_how_it_ended(index, tmp_path, promise):
    "`cpcl app`, as it is used."
    at = Path(index.manifest.folder).parent / "index"
    program = f"import sys; from cpcl.cli import main; sys.exit(main(['app', {str(at)!r}, '--port', '0']))"
    for number, status in ((signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        with running(tmp_path, program) as (process, port):
            hold_an_upload(tmp_path, port)
            process.send_signal(number)
            got, said = ended(process)
        line = f"cpcl: the page was stopped by {signal.Signals(number).name}\n"
        assert (got, said) == (status, line)
        assert list(tmp_path.iterdir()) == []
    promise("A stopped search page leaves no file", 2)


# --- what a machine may be like


def served_in(tmp, powerless=False, **env):
    "Check that a page in such an environment answers and takes an upload."
    with running(tmp, powerless=powerless, **env) as (process, port):
        assert Visitor(port).request("GET", "/")[0] == 200
        Visitor(port).upload(b"a face")
        process.terminate()
        assert ended(process)[0] == 143


def without_powers():
    "Before a program starts: root may no longer do what others may not (prctl, PR_CAPBSET_DROP)."
    import ctypes

    for power in range(64):
        ctypes.CDLL(None).prctl(24, power, 0, 0, 0)


@POSIX
@pytest.mark.slow
def test_gradio_folder_of_somebody_else(tmp_path, promise):
    "The shared folder for Gradio's files is closed: it belongs to another user."
    shared = tmp_path / "gradio"
    shared.mkdir()
    if os.getuid() == 0:
        os.chown(shared, 65534, 65534)
    shared.chmod(0o700 if os.getuid() == 0 else 0)
    probe = [sys.executable, "-c", f"import os; os.listdir({str(shared)!r})"]
    if not subprocess.run(probe, preexec_fn=without_powers, capture_output=True).returncode:
        pytest.skip("no folder is closed to this user")
    served_in(tmp_path, powerless=True)
    assert [p.name for p in tmp_path.iterdir()] == ["gradio"]
    promise("A search page starts on any machine")


@pytest.mark.slow
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "nonsense://x:y"])
def test_a_proxy_in_the_environment_does_not_matter(tmp_path, proxy, promise):
    names = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    served_in(tmp_path, **{name: proxy for name in names}, NO_PROXY="", no_proxy="")
    promise("A search page starts on any machine")
