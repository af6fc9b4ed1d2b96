"A command writes only to folders it made, runs no program of a stranger, and resumes only what it started."

import json, os, shutil, subprocess, sys
from pathlib import Path
from unittest import mock

import commands
import pytest

from cpcl.synth.dataset import write_synth
from cpcl.train.checkpoint import read_history

SMALL = "--pretrained none --height 48 --width 24 --epochs 1 --preset clip"


def cpcl(words):
    "(exit status, stdout, stderr) of a command, in one text."
    return commands.cpcl(*words.split())


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    "A data set and a run of it, never changed afterwards."
    base = tmp_path_factory.mktemp("things")
    write_synth(base / "set", people=24, seed=11, splits=(14, 4, 6))
    assert cpcl(f"train --root {base}/set --out {base}/run {SMALL}")[0] == 0
    return base


# --- folders that are somebody's

MINE = {  # a name that a command would write or remove -> what somebody keeps under it
    "thesis.txt": "precious",
    "table.json": "{}",
    "manifest.json": '{"name": "my web app"}',
    "vectors-mine.faiss": "mine",
    "rows-mine.parquet": "mine",
    "config.json": '{"theme": "dark"}',
    "README.md": "# Mine",
    "log.json": "[]",
    "synth.json": "{}",
    "reid_raw.json": "[]",
    "imgs/me.jpg": "dear",
    "index.html": "<p>mine",
    "model.safetensors": "mine",
}
WRITE = {
    "train": "train --root {set} --out {mine} " + SMALL,
    "resume": "train --root {set} --out {mine} --resume " + SMALL,
    "demo": "demo --out {mine} --epochs 1",
    "index": "index {set}/imgs --run {run} --out {mine}",
    "export": "export {run} --out {mine}",
    "synth": "synth {mine} --people 6",
    "pretrain": "pretrain {mine} --samples 64 --people 4",
}


@pytest.mark.parametrize("command", WRITE)
def test_a_folder_of_somebody_is_refused(command, things, tmp_path, promise):
    promise("a folder that a command did not make is refused and stays as it is")
    mine = tmp_path / "mine"
    for name, text in MINE.items():
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text(text)
    before = contents(mine)
    status, _, err = cpcl(WRITE[command].format(set=things / "set", run=things / "run", mine=mine))
    assert status == 2 and "is not empty and was not made by `cpcl" in err and "Traceback" not in err, err
    assert contents(mine) == before


INPUTS = {
    "train": "train --root {set} --out {set} " + SMALL,
    "index": "index {set}/imgs --run {run} --out {set}/imgs",
    "index of a run": "index {set}/imgs --run {run} --out {run}",
    "export": "export {run} --out {run}",
    "a link": "train --root {set} --out {link} " + SMALL,
}


@pytest.mark.parametrize("command", INPUTS)
def test_what_is_read_is_not_written(command, things, tmp_path, promise):
    promise("--out that is also an input is refused, under another name of it too")
    link = tmp_path / "link"
    link.symlink_to(things / "set")
    before = contents(things)
    status, _, err = cpcl(INPUTS[command].format(set=things / "set", run=things / "run", link=link))
    assert status == 2 and "--out" in err and "Traceback" not in err, err
    assert contents(things) == before


@pytest.mark.parametrize("place", ["file/out", "link", "link/out", "x/" * 1000])
def test_a_place_that_cannot_be_is_refused_before_anything_is_read(place, things, tmp_path, promise):
    promise("an --out that cannot be written is refused before an image is read")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nothing")
    with mock.patch("cpcl.train.runs._read_images", side_effect=AssertionError("images are read")):
        for command in ("train", "index", "synth"):
            words = WRITE[command].format(set=things / "set", run=things / "run", mine=tmp_path / place)
            if command == "train" and place.startswith("x/"):
                continue  # found when the folder is made
            status, _, err = cpcl(words)
            assert status == 2 and err.count("\n") == 1, err


def test_what_somebody_adds_to_our_folder_stays(things, tmp_path, promise):
    promise("a file that a user puts into a folder of ours survives a second run of the command", 3)
    for command, words in {
        "synth": f"synth {tmp_path}/synth --people 6",
        "export": f"export {things}/run --out {tmp_path}/export",
        "index": f"index {things}/set/imgs --run {things}/run --out {tmp_path}/index",
    }.items():
        assert cpcl(words)[0] == 0
        notes = tmp_path / command / ".notes-20261126.txt"
        notes.write_text("precious")
        assert cpcl(words)[0] == 0, command
        assert notes.read_text() == "precious", command


# --- programs of a stranger


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_no_program_of_a_strange_repository_runs(things, tmp_path, monkeypatch, promise):
    promise(
        "no program runs that a repository around the working folder names, and its settings are not ours"
    )
    strange, trace = tmp_path / "strange", tmp_path / "trace"
    shutil.copytree(things / "set", strange)
    trap = tmp_path / "trap.sh"
    trap.write_text(f"#!/bin/sh\ntouch {trace}\n")
    trap.chmod(0o755)
    (strange / "settings.ini").write_text("[DEFAULT]\nlib_name = cpcl\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run(["git", *command], cwd=strange, check=True)
    theirs = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=strange, capture_output=True, text=True
    )
    for name in ("core.fsmonitor", "core.pager", "core.sshCommand"):
        subprocess.run(["git", "config", name, str(trap)], cwd=strange, check=True)
    monkeypatch.chdir(strange)
    status, out, err = cpcl(f"train --root . --out {tmp_path}/r {SMALL}")
    assert status == 0, err
    assert not trace.exists()
    made = json.loads((tmp_path / "r" / "environment.json").read_text())
    assert theirs.stdout.strip() and theirs.stdout.strip() not in made["commit"]


def test_settings_of_another_program_are_not_read(things, tmp_path, monkeypatch, promise):
    promise("a settings.ini above the working folder in any encoding, readable or not, changes nothing", 3)
    for n, content in enumerate((b"\xff\xfe[\0a\0]\0", "[größe]".encode("latin1"), None)):
        folder = tmp_path / str(n) / "project"
        folder.mkdir(parents=True)
        settings = folder.parent / "settings.ini"
        settings.mkdir() if content is None else settings.write_bytes(content)
        monkeypatch.chdir(folder)
        status, _, err = cpcl(f"train --root {things}/set --out {tmp_path}/r{n} {SMALL}")
        assert status == 0, err


def test_secrets_stay_out_of_the_run_folder(things, tmp_path, monkeypatch, promise):
    promise("a password or a token on the command line is not written to the run folder")
    monkeypatch.setattr(
        sys, "argv", ["cpcl", "train", "--hub-token", "s3cretvalue", "http://me:hunter22@host"]
    )
    assert cpcl(f"train --root {things}/set --out {tmp_path}/r {SMALL}")[0] == 0
    written = b"".join(contents(tmp_path / "r").values())
    assert b"s3cretvalue" not in written and b"hunter22" not in written and b"--hub-token ***" in written


# --- resuming


def change(folder, what):
    "Change a data set."
    file = folder / "reid_raw.json"
    rows = json.loads(file.read_text())
    if what == "a caption":
        rows[0]["captions"][0] += " and a hat"
    elif what == "an image":
        (folder / "imgs" / rows[0]["file_path"]).write_bytes(
            (folder / "imgs" / rows[5]["file_path"]).read_bytes()
        )
    elif what == "fewer images":
        rows.remove(next(r for r in rows if r["split"] == "train"))
    elif what == "a caption of val":
        next(r for r in rows if r["split"] == "val")["captions"][0] += " and a hat"
    elif what == "other pairs":
        a, b = [r for r in rows if r["split"] == "train"][:2]
        a["captions"], b["captions"] = b["captions"], a["captions"]
    file.write_text(json.dumps(rows))


CHANGES = ("a caption", "an image", "fewer images", "a caption of val", "other pairs")


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("finished", (True, False))
def test_other_data_is_not_resumed(what, finished, things, tmp_path, promise):
    promise("a run is not resumed on other data: its folder stays as it is")
    shutil.copytree(things / "set", tmp_path / "set")
    shutil.copytree(things / "run", tmp_path / "run")
    words = f"train --root {tmp_path}/set --out {tmp_path}/run --resume {SMALL}"
    if not finished:  # as after a kill in the first epoch
        for name in (
            "state.safetensors",
            "result.json",
            "history.jsonl",
            "last.safetensors",
            "best.safetensors",
        ):
            (tmp_path / "run" / name).unlink()
    change(tmp_path / "set", what)
    before = contents(tmp_path / "run")
    status, _, err = cpcl(words)
    assert status == 2 and "was made with" in err and "--root" in err and "--out" in err, err
    assert contents(tmp_path / "run") == before


def test_moved_data_is_resumed(things, tmp_path, promise):
    promise("a run is resumed when its data set was moved")
    shutil.copytree(things / "run", tmp_path / "run")
    shutil.copytree(things / "set", tmp_path / "elsewhere")
    status, _, err = cpcl(f"train --root {tmp_path}/elsewhere --out {tmp_path}/run --resume {SMALL}")
    assert status == 0, err
    said = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert said["root"] == str(tmp_path / "elsewhere")


def test_other_weights_are_not_resumed(things, tmp_path, promise):
    promise("a run is not resumed from other starting weights under the same name")
    weights = tmp_path / "w.safetensors"
    shutil.copy(things / "run" / "last.safetensors", weights)
    small = SMALL.replace("--pretrained none", f"--pretrained {weights}")
    words = f"train --root {things}/set --out {tmp_path}/run {small}"
    assert cpcl(words)[0] == 0
    assert cpcl(f"train --root {things}/set --out {tmp_path}/other {SMALL} --seed 4")[0] == 0
    shutil.copy(tmp_path / "other" / "last.safetensors", weights)
    before = contents(tmp_path / "run")
    status, _, err = cpcl(f"{words} --resume")
    assert status == 2 and "was started from other weights" in err, err
    assert contents(tmp_path / "run") == before


def test_another_text_of_a_loss_is_not_resumed(things, tmp_path, promise):
    promise("a run is not resumed with another text of its own loss")
    (tmp_path / "mine.py").write_text("from cpcl.hcm import hcm_loss\n")
    words = f"train --root {things}/set --out {tmp_path}/run {SMALL} --loss {tmp_path}/mine.py:hcm_loss"
    assert cpcl(words)[0] == 0
    assert cpcl(f"{words} --resume")[0] == 0
    (tmp_path / "mine.py").write_text("from cpcl.hcm import hcm_loss  # changed\n")
    status, _, err = cpcl(f"{words} --resume")
    assert status == 2 and "another text in the file of --loss" in err, err


def test_flags_of_the_start_are_named(things, tmp_path, monkeypatch, promise):
    promise("a run resumed with other flags names those of the start")
    monkeypatch.setattr(sys, "argv", ["cpcl", "train", "--epochs", "1", "--seed", "3"])
    assert cpcl(f"train --root {things}/set --out {tmp_path}/run {SMALL} --seed 3")[0] == 0
    status, _, err = cpcl(f"train --root {things}/set --out {tmp_path}/run {SMALL} --resume")
    assert status == 2 and "cpcl train --epochs 1 --seed 3" in err and "seed was 3, now 0" in err, err


def test_damaged_environment_does_not_stop_a_resume(things, tmp_path, promise):
    promise("a damaged environment.json, which nothing needs, does not stop a resume", 4)
    for n, text in enumerate(("", "[]", "[" * 100_000, '{"earlier": 3}')):
        run = tmp_path / str(n)
        shutil.copytree(things / "run", run)
        (run / "environment.json").write_text(text)
        status, _, err = cpcl(f"train --root {things}/set --out {run} --resume {SMALL}")
        assert status == 0, err


# --- two at once

HOLD = """
import sys
from cpcl.train.start import run_folder
with run_folder(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_in_use_is_refused(things, tmp_path, promise):
    promise("a run folder in use is refused, and is free as soon as its process is dead", 2)
    run = tmp_path / "run"
    shutil.copytree(things / "run", run)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    before = contents(run)
    words = f"train --root {things}/set --out {run} --resume {SMALL}"
    with mock.patch("cpcl.files.WAIT", 0.2):
        status, _, err = cpcl(words)
    assert status == 2 and "is in use by another process" in err, err
    assert contents(run) == before
    holder.kill()
    holder.wait()
    assert cpcl(words)[0] == 0


def test_two_trainings_into_one_folder(things, tmp_path, promise):
    promise("of two trainings into one new folder one wins, and the folder is that of a single run")
    words = f"train --root {things}/set --out {tmp_path}/run {SMALL}".split()
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "cpcl.cli", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [p.communicate(timeout=300)[1] for p in both]
    assert sorted(p.returncode for p in both) == [0, 2], said
    assert not any("Traceback" in text for text in said)
    assert len(read_history(tmp_path / "run")) == 1


# --- settings that reach a run past its configuration

LEFT = (
    dict(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4"),
    dict(ACCELERATE_MIXED_PRECISION="bf16"),
    dict(ACCELERATE_MIXED_PRECISION="fp8", ACCELERATE_FP8_BACKEND="TE"),
    dict(ACCELERATE_USE_DEEPSPEED="true"),
    dict(ACCELERATE_USE_FSDP="true", ACCELERATE_DYNAMO_BACKEND="inductor"),
    dict(LOCAL_RANK="0"),
    dict(LOCAL_RANK="x", RANK="", WORLD_SIZE="8"),
    dict(PMI_SIZE="4", OMPI_COMM_WORLD_SIZE="4"),
)


@pytest.mark.slow
@pytest.mark.parametrize("left", LEFT)
def test_environment_does_not_change_a_run(left, things, tmp_path, promise):
    promise("what other programs left in the environment changes no digit of a run")
    words = f"train --root {things}/set --out {tmp_path}/run {SMALL}".split()
    done = subprocess.run(
        [sys.executable, "-m", "cpcl.cli", *words],
        env=os.environ | left,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    keep = ("loss", "gradient", "val_R1", "val_mAP")
    rows = [read_history(run)[0] for run in (things / "run", tmp_path / "run")]
    assert [rows[0][k] for k in keep] == [rows[1][k] for k in keep]
