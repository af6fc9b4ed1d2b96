"What a user types and what a terminal shows: flags, paths with ~, pipes, signals, names of any kind."

import contextlib, dataclasses, io, json, os, signal, subprocess, sys, time, typing

from commands import cpcl
import pytest
from PIL import Image

from cpcl.cli import COMMANDS, main, parse
from cpcl.cli.flags import flat
from cpcl.synth.dataset import write_synth

SMALL = (
    "--pretrained none --height 48 --width 24 --epochs 1 --set labels.image.k1=6 --set labels.caption.k1=6"
)
NEEDED = {  # what a command cannot do without
    "eval": ["RUN"],
    "synth": ["OUT"],
    "doctor": ["ROOT"],
    "pretrain": ["OUT"],
    "convert": ["FILE"],
    "ablate": ["99_none"],
    "index": ["FOLDER", "--run", "RUN", "--out", "OUT"],
    "search": ["INDEX", "a man"],
    "app": ["INDEX"],
    "serve": ["INDEX"],
    "export": ["RUN", "--out", "OUT"],
    "crop": ["FOLDER", "--out", "OUT"],
    "compare": ["RUN", "RUN"],
    "report": ["RUN"],
}


def process(*words, **options):
    "A command as a process of its own."
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | options
    return subprocess.Popen([sys.executable, "-m", "cpcl.cli", *map(str, words)], **options)


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    "A data set, a run trained on it and an index of its images."
    base = tmp_path_factory.mktemp("things")
    write_synth(base / "set", people=24, seed=11, layout="cuhk-pedes", splits=(14, 4, 6))
    for words in (
        ["train", "--root", base / "set", "--out", base / "run", *SMALL.split()],
        ["index", base / "set" / "imgs", "--run", base / "run", "--out", base / "index"],
    ):
        code, out, err = cpcl(*words)
        assert code == 0, (out, err)
    return base


# --- flags


def of_type(*kinds):
    "Every (command, flag, its values given twice) whose field has one of some types."
    for name, command in COMMANDS.items():
        hints = typing.get_type_hints(command)
        for field in dataclasses.fields(command):
            if hints[field.name] in kinds and field.default is not dataclasses.MISSING:
                yield pytest.param(name, field.name, id=f"{name} --{field.name}")


@pytest.mark.parametrize("name, field", of_type(tuple[str, ...], tuple[tuple[str, ...], ...]))
def test_a_flag_given_again_adds_up(name, field, promise):
    promise("flags that are given again add up", cases=3)
    for words in ("{0} a=1 b=2 {0} c=3", "{0}=a=1 {0} b=2 {0}=c=3", "{0} a=1 b=2 c=3"):
        got = getattr(parse([name, *NEEDED.get(name, []), *words.format(f"--{field}").split()]), field)
        assert flat(got) == ("a=1", "b=2", "c=3"), got


@pytest.mark.parametrize("name, field", of_type(int, float, tuple[int, int]))
def test_a_number_out_of_range_is_named_with_its_flag(name, field, things, tmp_path, monkeypatch, promise):
    monkeypatch.chdir(tmp_path)
    flag = "-k" if field == "k" else f"--{field.replace('_', '-')}"
    kind = typing.get_type_hints(COMMANDS[name])[field]
    places = dict(
        RUN=things / "run", INDEX=things / "index", FOLDER=things / "set" / "imgs", ROOT=things / "set"
    )
    words = [name, *(places.get(w, w) for w in NEEDED.get(name, []))]
    bad = [["-1"], ["-99999"], ["1" + "0" * 30]] + ([["nan"], ["inf"]] if kind is float else [])
    promise("numbers out of range are named with their flag", cases=len(bad))
    for values in bad:
        code, out, err = cpcl(*words, flag, *values * (2 if kind == tuple[int, int] else 1))
        assert code == 2 and err.count("\n") == 1 and err.startswith("cpcl: ") and out == "", (
            values,
            out,
            err,
        )
        assert flag.strip("-") in err.split(" must be ")[0] and " must be " in err, err
    assert list(tmp_path.iterdir()) == []


# --- paths


def test_home_is_expanded_everywhere(things, tmp_path, monkeypatch, promise):
    "`--out=~/x` is in the home folder, in every command, and no folder called ~ is made."
    here, home = tmp_path / "here", tmp_path / "home"
    here.mkdir()
    home.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    for name in ("set", "run", "index"):
        (home / name).symlink_to(things / name)
    photo = next((things / "set" / "imgs").rglob("*.jpg"))
    (home / "x.jpg").write_bytes(photo.read_bytes())
    cases = [
        ("synth", "--people", "3", "--shots", "2", "~/drawn"),
        ("doctor", "~/set"),
        ("train", "--root=~/set", "--out=~/out", "--pretrained=~/run/last.safetensors", *SMALL.split()[2:]),
        ("eval", "~/run", "--root=~/set"),
        ("export", "~/run", "--out=~/model"),
        ("index", "~/set/imgs", "--run=~/run", "--out=~/idx"),
        ("search", "~/idx", "--image=~/x.jpg"),
    ]
    promise("~ is the home folder everywhere", cases=len(cases))
    for words in cases:
        code, out, err = cpcl(*words)
        assert code == 0, (words, out, err)
    made = {"drawn", "out", "model", "idx"}
    assert made <= {p.name for p in home.iterdir()} and not list(here.iterdir())


@pytest.mark.parametrize("name", "train synth pretrain demo index export eval doctor convert".split())
def test_a_name_that_is_no_unicode_is_one_line(name, things, tmp_path, monkeypatch, promise):
    promise("names that are no Unicode are one line")
    monkeypatch.chdir(tmp_path)
    odd = os.fsdecode(b"r_\xe9")
    words = {
        "train": ["--root", things / "set", "--out", odd],
        "demo": ["--out", odd],
        "index": [things / "set" / "imgs", "--run", things / "run", "--out", odd],
        "export": [things / "run", "--out", odd],
        "eval": [things / "run", "--root", odd],
    }.get(name, [odd])
    code, out, err = cpcl(name, *words)
    said = err if name != "doctor" else out
    assert code == (1 if name == "doctor" else 2) and "not valid Unicode" in said, (out, err)
    assert err.count("\n") == (name != "doctor") and "\\udce9" in said
    assert list(tmp_path.iterdir()) == []


# --- what a run is scored on


def test_a_score_names_its_data(things, tmp_path, promise):
    promise("scores name their data set", cases=4)
    code, out, err = cpcl("eval", things / "run", "--json")
    mine = json.loads(out)
    assert (mine["name"], mine["split"], mine["note"]) == ("cuhk-pedes", "test", "")
    assert mine["root"] == str((things / "set").resolve()) and mine["people"] == 6
    stored = json.loads((things / "run" / "result.json").read_text())["last"]
    assert round(mine["text to image"]["R1"], 4) == stored["R1"]
    code, out, err = cpcl("eval", things / "run")
    assert (
        f"test split: {mine['images']} images, {mine['captions']} captions, 6 people" in out.splitlines()[0]
    )
    other = write_synth(tmp_path / "other", people=9, seed=3)
    code, out, err = cpcl("eval", things / "run", "--root", other)
    assert "another data set than the run was trained on" in out.splitlines()[1]
    code, out, err = cpcl("eval", things / "run", "--root", other, "--json")
    assert "another data set" in json.loads(out)["note"]


def test_a_number_that_is_none_is_null(things, tmp_path, promise):
    "One person, or none with a match: there is no interval, and JSON says null."

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    one = write_synth(tmp_path / "one", people=3, seed=3)
    records = json.loads((one / "reid_raw.json").read_text())
    alone = [r for r in records if r["split"] == "test"][:1]
    promise("NaN is never written as JSON", cases=2)
    for kept in (records, alone):
        (one / "reid_raw.json").write_text(json.dumps(kept))
        code, out, err = cpcl("eval", things / "run", "--root", one, "--json", "--rerank")
        rows = json.loads(out, parse_constant=refuse)
        assert code == 0 and rows["text to image"]["R1_95"] is None, (out, err)
        code, out, err = cpcl("eval", things / "run", "--root", one)
        assert code == 0 and "nan" not in out.lower() and " -" in out


def test_a_training_says_once_what_it_does_not_read(tmp_path, promise):
    promise("captions that are cut are reported")
    root = write_synth(tmp_path / "set", people=24, seed=11, layout="cuhk-pedes", splits=(14, 4, 6))
    records = json.loads((root / "reid_raw.json").read_text())
    changed = [r for r in records if r["split"] == "train"][:3]
    for record in changed:
        record["captions"][0] = "a man " * 38 + "with a red\x1b[31m bag"
    (root / "reid_raw.json").write_text(json.dumps(records))
    words = ["train", "--root", root, "--out", tmp_path / "out", *SMALL.split(), "--epochs", 2]
    code, out, err = cpcl(*words)
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert code == 0 and len(notes) == 1, (out, err)
    captions = sum(len(r["captions"]) for r in records if r["split"] == "train")
    assert notes[0].startswith(f"note: 3 of {captions} captions are longer than 77 tokens and lose their end")
    assert "'man with a red bag'" in notes[0]


# --- what a terminal shows


def test_no_name_reaches_the_terminal_raw(things, tmp_path, promise):
    "Neither the name of a folder, of a file or of a column nor a caption moves the cursor."
    root = tmp_path / "x\x1b]0;y\x07z"
    root.mkdir()
    for name in ("a\x9b2J.jpg", "b\u202egpj.jpg", "c.jpg"):
        Image.new("RGB", (24, 48)).save(root / name)
    (root / "d\x9b31m.jpg").write_text("<html>")
    rows = [dict(image=p.name, caption="a man \x1b[31m" + "x " * 90) for p in root.iterdir()]
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf8")
    (root / "t.csv").write_text("path,ca\x1b[31mm\nc.jpg,1\x1b[0m\n", encoding="utf8")
    cases = [
        ("doctor", root),
        ("train", "--root", root, "--out", root / "out"),
        ("eval", things / "run", "--root", root, "--split", "train"),
        ("index", root, "--run", things / "run", "--out", root / "index", "--columns", root / "t.csv"),
        ("search", root / "index", "a man"),
        ("search", root / "index", "a man", "--where", "x\x1b[31m=1"),
        ("synth", root / "new\x1b[1m", "--people", 3),
        ("convert", root / "x\x1b[1m.pt"),
        ("export", things / "run", "--out", root / "model"),
        ("ablate", "x\x1b[1m"),
        ("train", "--epochz\x1b[1m"),
    ]
    promise("names are printed without control characters", cases=len(cases))
    for words in cases:
        code, out, err = cpcl(*words)
        assert code in (0, 1, 2), (words, out, err)
        said = "".join(line for line in (out + err).split("\n"))
        assert all(c.isprintable() for c in said), (words, out, err)


def test_an_encoding_that_lacks_a_letter_escapes_it(things, tmp_path, promise):
    promise("output that cannot write a name escapes it", cases=4)
    folder = tmp_path / "g"
    folder.mkdir()
    Image.new("RGB", (24, 48)).save(folder / "图.jpg")
    assert cpcl("index", folder, "--run", things / "run", "--out", tmp_path / "i")[0] == 0
    for code, words in {
        0: ["search", tmp_path / "i", "a man"],
        1: ["doctor", tmp_path / "图"],
        2: ["train", "--root", tmp_path / "图"],
    }.items():
        latin = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", errors="strict")
        with contextlib.redirect_stdout(latin), contextlib.redirect_stderr(latin):
            assert main([str(w) for w in words]) == code
        assert b"\\u56fe" in latin.buffer.getvalue() and latin.errors == "strict"
    done = process("doctor", tmp_path / "图", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert "\\u56fe" in done.communicate(timeout=100)[0] and done.returncode == 1


ALIKE = [*([name, "--help"] for name in COMMANDS), ["doctor"], ["eval"], ["index"]]  # one code path for all
CLOSED = [["--help"], ["search"], *(pytest.param(words, marks=pytest.mark.slow) for words in ALIKE)]


@pytest.mark.parametrize("words", CLOSED, ids=" ".join)
def test_a_closed_pipe_ends_quietly(words, things, tmp_path, promise):
    "As with `| true`: the reader is gone before anything is written."
    promise("a closed pipe ends a command quietly, with 141")
    more = {
        "search": [things / "index", "a man", "-k", 99],
        "doctor": [things / "set"],
        "eval": [things / "run", "--json"],
        "index": [things / "set" / "imgs", "--run", things / "run", "--out", tmp_path / "i"],
    }
    if "--help" not in words:
        words = [*words, *more[words[0]]]
    read, write = os.pipe()
    os.close(read)
    done = process(*words, stdout=write)
    os.close(write)
    _, err = done.communicate(timeout=100)
    assert (done.returncode, err) == (141, ""), err


@pytest.mark.parametrize(
    "unbuffered", ["", pytest.param("1", marks=pytest.mark.slow)], ids=["buffered", "unbuffered"]
)
def test_a_full_disk_behind_the_output_is_one_line(things, unbuffered, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)  # "": Python would write the rest when it ends
    with open("/dev/full", "w") as full:
        done = process("doctor", things / "set", stdout=full)
        _, err = done.communicate(timeout=100)
    assert done.returncode == 2 and err.startswith("cpcl: the disk: No space left"), err
    assert err.count("\n") == 1, err


# --- signals


WAITS = """
import os, sys, time
from unittest import mock
from cpcl.cli import program
command = program.COMMANDS[sys.argv[1]]
def wait(self):
    print("started", flush=True)
    time.sleep(60)
with mock.patch.object(command, "run", wait):
    sys.exit(program.main(sys.argv[1:]))
"""
GOES_ON = {"train": "--resume", "demo": "again", "ablate": "continues", "pretrain": "continues"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda n: n.name)
@pytest.mark.parametrize("name", "train demo ablate pretrain app search eval".split())
def test_a_stopped_command_says_what_was_stopped(name, number, promise):
    promise("a stopped command says what was stopped")
    words = [sys.executable, "-c", WAITS, name, *NEEDED.get(name, [])]
    done = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.stdout.readline() == "started\n", done.communicate()
    time.sleep(0.05)
    done.send_signal(number)
    _, err = done.communicate(timeout=60)
    by = "" if number == signal.SIGINT else f" by {number.name}"
    what = "the page was stopped" if name == "app" else "stopped"
    assert done.returncode == 128 + number and err.strip().startswith(f"cpcl: {what}{by}"), err
    assert err.strip().count("\n") == 0
    assert GOES_ON[name] in err if name in GOES_ON else ":" not in err.strip()[5:], err


def test_a_closed_terminal_does_not_stop_what_nohup_started():
    done = subprocess.Popen(
        [sys.executable, "-c", WAITS, "search", "INDEX", "x"],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert done.stdout.readline() == "started\n"
    done.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        done.wait(timeout=1)
    done.kill()
    done.communicate()


def test_little_memory_is_one_line(things, promise):
    "Under `ulimit -v` an import or an allocation fails, in whatever words."
    promise("no memory and broken packages are one line", cases=5)
    for megabytes in (300, 500, 800, 1200, 2000):
        limited = [
            "bash",
            "-c",
            f'ulimit -v {megabytes * 1024}; exec "$@"',
            "_",
            sys.executable,
            "-m",
            "cpcl.cli",
        ]
        done = subprocess.run([*limited, "doctor", str(things / "set")], capture_output=True, text=True)
        if done.returncode < 0 or done.returncode > 128:
            continue  # a library ended the process by itself
        last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
        assert done.returncode == 0 or last.startswith("cpcl: ") or "LLVM" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr, done.stderr


def test_a_wrong_variable_of_a_package_is_one_line(things, promise):
    promise("no memory and broken packages are one line", 2)
    for name, words in {
        "TQDM_MININTERVAL": ["doctor", things / "set"],
        "MPLBACKEND": ["train", "--root", things / "set", "--epochs", "1"],
    }.items():
        done = process(*words, env=os.environ | {name: "nonsense"})
        _, err = done.communicate(timeout=100)
        assert done.returncode == 2 and "correct the environment variable" in err, err
        assert err.count("\n") == 1 and "nonsense" in err, err


def test_a_broken_package_is_one_line(things, tmp_path, promise):
    promise("no memory and broken packages are one line")
    (tmp_path / "open_clip").mkdir()
    (tmp_path / "open_clip" / "__init__.py").write_text("raise ImportError('libfoo.so.1: no such file')")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = process("doctor", things / "set", env=os.environ | {"PYTHONPATH": paths})
    _, err = done.communicate(timeout=100)
    assert done.returncode == 2 and "(libfoo.so.1: no such file)" in err and err.count("\n") == 1, err
