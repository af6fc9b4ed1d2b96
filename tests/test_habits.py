"What users take for granted elsewhere: settings in a file, completion, pipes, trackers, more epochs."

import contextlib, io, json, os, shutil, signal, stat, subprocess, sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import commands
import pytest
from accelerate.tracking import GeneralTracker
from huggingface_hub import ModelCard

import cpcl
from cpcl.cli import COMMANDS, main
from cpcl.data import load_split
from cpcl.files import read_json
from cpcl.synth.dataset import write_synth
from cpcl.train import fit, read_config, read_history
from cpcl.train.config import override
from cpcl.train.epoch import set_learning_rate
from cpcl.train.schedule import rate_at

SMALL = "--pretrained none --height 48 --width 24 --preset clip".split()


def works(*words):
    code, out, err = commands.cpcl(*words)
    assert code == 0, (out, err)
    return out, err


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A data set and a run of two epochs."
    base = tmp_path_factory.mktemp("habits")
    write_synth(base / "set", people=16, seed=11, layout="cuhk-pedes", splits=(8, 3, 5))
    works("train", "--root", base / "set", "--out", base / "run", "--epochs", 2, "--batch-size", 16, *SMALL)
    return base


def weights(run_folder):
    return (Path(run_folder) / "last.safetensors").read_bytes()


# --- version and settings


def test_version_needs_nothing():
    code = "import sys\nfrom cpcl.cli import main\nmain(['--version'])\nprint('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [f"cpcl {cpcl.__version__}", "False"]
    assert "\ntorch " in works("--version", "--verbose")[0]


def test_settings_of_the_command_line():
    names = [line.split()[0] for line in works("settings", "optim")[0].splitlines()]
    assert "optim.lr" in names and all(name.startswith("optim.") for name in names)
    assert {row["name"] for row in json.loads(works("settings", "--json")[0])} >= {"hcm.tau_p", "seed"}
    code, out, err = commands.cpcl("settings", "hcm.tau")
    assert (code, out) == (2, "") and err == "cpcl: there is no setting 'hcm.tau', did you mean hcm.tau_p?\n"
    code, out, err = commands.cpcl("train", "--set", "hcm.x=1")
    assert code == 2 and err.startswith("cpcl: hcm has no setting 'x'") and err.count("\n") == 1


# --- a file of settings


def test_a_run_is_made_again_from_its_file(base, tmp_path):
    "A file of settings gives the same bits."
    works("train", "--config", base / "run" / "config.yaml", "--out", tmp_path / "again")
    assert weights(tmp_path / "again") == weights(base / "run")
    assert read_config(tmp_path / "again") == read_config(base / "run")


def test_the_command_line_wins_over_a_file(base, tmp_path):
    "And the file over a preset. The numbers that a file does not know are as ever."
    more = ("--epochs", 1, "--preset", "clip-itc", "--seed", 1, "--set", "optim.lr=0.002")
    with mock.patch("cpcl.train.train_run", return_value=None) as train_run:
        works("train", "--config", base / "run", "--out", tmp_path / "other", *more)
    (root, _, data), asked = train_run.call_args[0][:3], train_run.call_args[1]
    assert (data, train_run.call_args[0][3], asked["seed"]) == ("cuhk-pedes", "clip-itc", 1)
    assert root == (base / "set").resolve() and asked["encoder"].height == 48
    changes = asked["changes"]
    assert (changes["optim.epochs"], changes["optim.lr"], changes["optim.warmup"]) == (1, "0.002", 0.5)
    assert changes["hcm.icpm"] == 1.0 and "seed" not in changes and "preset" not in changes


@pytest.mark.parametrize(
    "text, says",
    [
        ("optim: {learning_rate: 1}", "there is no setting 'optim.learning_rate'"),
        ("presets: clip", "did you mean preset?"),
        ("preset: klip", "preset must be clip-itc | clip"),
        ("schedule: quick", "schedule must be auto | tiny | bench | paper"),
        ("seed: -1", "--seed must be in 0..4294967295"),
        ("seed: [1", "is not valid YAML (line 1"),
        ("", "holds no settings"),
        (None, "cannot read"),
    ],
)
def test_a_wrong_file_is_one_line(base, tmp_path, text, says):
    file = tmp_path / "a.yaml"
    if text is not None:
        file.write_text(text)
    code, out, err = commands.cpcl(
        "train", "--config", file, "--root", base / "set", "--out", tmp_path / "run"
    )
    assert (code, out, err.count("\n")) == (2, "", 1) and says in err, err
    assert not (tmp_path / "run").exists()


# --- more epochs


def killed(*words, epoch):
    "A training that is stopped when an epoch (from 1) is complete."
    from cpcl.train.loop import epoch_line as line

    def stop(row, epochs):
        if row.epoch + 1 == epoch:
            raise KeyboardInterrupt
        return line(row, epochs)

    with mock.patch("cpcl.train.loop.epoch_line", stop):
        assert commands.cpcl(*words)[0] == 130


def factors(*words):
    "The factor of the learning rate at every step of a command."
    seen = []

    def note(optimizer, factor, real=set_learning_rate):
        seen.append(factor)
        real(optimizer, factor)

    with mock.patch("cpcl.train.epoch.set_learning_rate", note):
        works(*words)
    return seen


MORE = (*SMALL, "--batch-size", 16, "--resume", "--epochs", 4)


def check_longer(base, longer, how, seen):
    "The added epochs of a run have the learning rates of the definition, and its folder says how they came."
    cfg, rows = read_config(longer), read_history(longer)
    assert (cfg.optim.epochs, cfg.optim.extended) == (4, f"{how}@2/2")
    assert [row.get("extended", "") for row in rows] == ["", "", f"{how}@2/2", f"{how}@2/2"]
    steps, planned = len(seen) // 2, override(read_config(base / "run").optim, {"epochs": 4})
    assert steps > 1
    stretched = [rate_at(planned, epoch, step, steps) for epoch in (2, 3) for step in range(steps)]
    assert seen == {"constant": [0.1] * 2 * steps, "stretch": stretched}[how]


def test_more_epochs(base, tmp_path):
    "More epochs are refused without a decision, and with it every step has the defined rate."
    longer = tmp_path / "run"
    shutil.copytree(base / "run", longer)
    words = ("train", "--root", base / "set", *MORE, "--out", longer)
    code, out, err = commands.cpcl(*words)
    assert code == 2 and "optim.epochs was 2, now 4" in err and "--extend constant or --extend stretch" in err
    check_longer(base, longer, "stretch", factors(*words, "--extend", "stretch"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["constant", "stretch"])
def test_more_epochs_with_the_same_bits(base, tmp_path, how):
    "An extended run that is killed, and one that is made from the file of an extended run, have its bits."
    for name in ("run", "killed"):
        shutil.copytree(base / "run", tmp_path / name)
    words = ("train", "--root", base / "set", *MORE, "--extend", how, "--out")
    seen = factors(*words, tmp_path / "run")
    check_longer(base, tmp_path / "run", how, seen)
    killed(*words, tmp_path / "killed", epoch=3)
    works(*words, tmp_path / "killed")
    whole = factors("train", "--config", tmp_path / "run", "--out", tmp_path / "whole")
    assert whole == base_factors(base, len(seen) // 2) + seen
    assert weights(tmp_path / "run") == weights(tmp_path / "killed") == weights(tmp_path / "whole")
    works(*words[:-3], "--out", tmp_path / "run")  # it is known to be longer
    works(*words, tmp_path / "run")


def base_factors(base, steps):
    optim = read_config(base / "run").optim
    return [rate_at(optim, epoch, step, steps) for epoch in range(optim.epochs) for step in range(steps)]


def test_the_warm_up_of_an_extended_run_is_said(base):
    "From Python, too, another warm-up than the run's is not dropped without a word."
    from cpcl.train.runs import _continued

    cfg, said = read_config(base / "run"), []
    for warmup, lines in ((cfg.optim.warmup, 0), (3.0, 0), (0.25, 1)):  # 3: as the epochs limited it
        asked = replace(cfg, optim=replace(cfg.optim, epochs=4, warmup=warmup))
        longer = _continued(base / "run", asked, True, "stretch", said.append)
        assert longer.optim.warmup == cfg.optim.warmup and len(said) == lines
    assert said == ["note: an extended run keeps its warm-up, here 1 epochs, not 0.25"]


def test_more_epochs_of_nothing(base, tmp_path):
    out = ("--root", base / "set", "--out", tmp_path / "nothing", "--epochs", 4, "--extend", "stretch")
    for words, says in (((), "give --resume and --epochs"), (("--resume",), "holds none")):
        code, _, err = commands.cpcl("train", *out, *words)
        assert code == 2 and says in err and err.count("\n") == 1 and not (tmp_path / "nothing").exists()
    fewer = ("--out", base / "run", "--resume", "--epochs", 1, "--extend", "stretch", "--batch-size", 16)
    code, _, err = commands.cpcl("train", "--root", base / "set", *SMALL, *fewer)
    assert code == 2 and "has 2 epochs: --extend stretch needs --epochs above that" in err


# --- trackers


class Memory(GeneralTracker):
    "A tracker that keeps what it is told."

    name, requires_logging_directory = "memory", False

    def __init__(self, fails=False):
        super().__init__()
        self.rows, self.fails = [], fails

    @property
    def tracker(self):
        return self

    def log(self, values, step=None, **kwargs):
        if self.fails:
            raise ConnectionError("no network")
        self.rows.append((step, values))


def test_trackers_of_a_resumed_run(base, tmp_path):
    "A tracker is told every epoch once, under one identifier; one that fails changes nothing but a line."
    cfg, split, said = read_config(base / "run"), load_split(base / "set", None, "train"), []
    memory, log = Memory(), said.append
    with mock.patch("cpcl.train.loop.epoch_line", side_effect=KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            fit(cfg, split, tmp_path / "run", trackers=["tensorboard", memory], log=log)
    first = read_json(tmp_path / "run" / "trackers.json")
    fit(cfg, split, tmp_path / "run", resume=True, trackers=["tensorboard", memory], log=log)
    assert read_json(tmp_path / "run" / "trackers.json") == first and len(first["memory"]["id"]) == 8
    epochs = [values["epoch/epoch"] for _, values in memory.rows if "epoch/epoch" in values]
    assert epochs == [1, 2] and [step for step, _ in memory.rows] == sorted(step for step, _ in memory.rows)
    assert [p.name.split(".")[:3] for p in (tmp_path / "run" / "tensorboard").iterdir()] == [
        ["events", "out", "tfevents"]
    ] * 2
    fit(cfg, split, tmp_path / "failed", trackers=[Memory(fails=True)], log=log)
    lines = [line for line in said if "tracker" in line]
    assert lines == ["the tracker memory failed (ConnectionError: no network): the run goes on without it"]
    assert (
        weights(tmp_path / "run") == weights(tmp_path / "failed")
        and not (tmp_path / "failed" / "tensorboard").exists()
    )


def test_an_unknown_tracker(base, tmp_path):
    code, out, err = commands.cpcl(
        "train", "--root", base / "set", "--out", tmp_path / "x", "--log", "tensorbord"
    )
    assert code == 2 and "there is no tracker 'tensorbord'" in err and not (tmp_path / "x").exists()


# --- log files, pipes, modes


def test_a_log_file_has_lines(base, tmp_path, monkeypatch):
    "No carriage return where nobody watches; a line of progress instead, after a while."
    monkeypatch.setattr("cpcl.core.LINE_EVERY", 0)
    monkeypatch.setattr("cpcl.core.WIDGETS", False)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    out, err = works("train", "--root", base / "set", "--out", tmp_path / "run", "--epochs", 1, *SMALL)
    assert "\r" not in out + err and any(line.startswith("epoch 1: ") for line in err.splitlines()), err


@contextlib.contextmanager
def reader_gone():
    "stdout is a pipe from which nobody reads, as with `| head`."
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stdout, contextlib.redirect_stdout(stdout):
        try:
            yield
        finally:
            with contextlib.suppress(BrokenPipeError):
                stdout.flush()


def piped(base, tmp_path):
    "What each command needs to print something."
    shutil.copytree(base / "run", tmp_path / "run")
    works("index", base / "set" / "imgs", "--run", tmp_path / "run", "--out", tmp_path / "index")
    return {
        "train": ["--root", base / "set", "--out", tmp_path / "t", "--epochs", 1, *SMALL],
        "eval": [tmp_path / "run"],
        "settings": [],
        "synth": [tmp_path / "drawn", "--people", 3],
        "doctor": [base / "set"],
        "index": [base / "set" / "imgs", "--run", tmp_path / "run", "--out", tmp_path / "index2"],
        "search": [tmp_path / "index", "a man"],
        "export": [tmp_path / "run", "--out", tmp_path / "model"],
        "pretrain": ["--help"],
        "convert": ["--help"],
        "demo": ["--help"],
        "ablate": ["--help"],
        "app": ["--help"],
        "--version": [],
    }


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="no pipes of this kind")
def test_a_reader_that_leaves_is_no_error(base, tmp_path, promise):
    "`cpcl ... | head`, for every command: status 141, and not a word."
    cases = piped(base, tmp_path)
    promise("a reader that leaves early is no error", cases=len(cases))
    for name in COMMANDS.keys() - cases.keys():
        cases[name] = ["--help"]
    for name, words in cases.items():
        err = io.StringIO()
        with contextlib.redirect_stderr(err), reader_gone():
            try:
                code = main([name, *map(str, words)])
            except SystemExit as e:
                code = e.code
        lines = [line for line in err.getvalue().splitlines() if not line.startswith("note: ")]
        assert (name, code, lines) == (name, 128 + signal.SIGPIPE, [])


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
@pytest.mark.parametrize(
    "umask, file_mode, folder_mode",
    [(0o022, 0o644, 0o755), pytest.param(0o077, 0o600, 0o700, marks=pytest.mark.slow)],
)
def test_what_is_written_is_as_readable_as_the_umask_says(base, tmp_path, umask, file_mode, folder_mode):
    before = os.umask(umask)
    try:
        works("train", "--root", base / "set", "--out", tmp_path / "a" / "run", "--epochs", 1, *SMALL)
        works("export", tmp_path / "a" / "run", "--out", tmp_path / "a" / "model", "--license", "mit")
        works(
            "index", base / "set" / "imgs", "--run", tmp_path / "a" / "run", "--out", tmp_path / "a" / "index"
        )
    finally:
        os.umask(before)
    for path in (tmp_path / "a").rglob("*"):
        if path.name != ".cpcl-lock":  # holds nothing
            wanted = folder_mode if path.is_dir() else file_mode
            assert stat.S_IMODE(path.stat().st_mode) == wanted, path
    card = ModelCard.load(tmp_path / "a" / "model" / "README.md").data
    assert (card.license, card.library_name, card.base_model) == ("mit", "cpcl", None)
    assert {r.metric_name for r in card.eval_results} >= {"R1", "mAP"}


# --- completion


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_bash_completes(tmp_path):
    "A shell that reads the script completes commands, flags and choices, without starting cpcl."
    script = tmp_path / "cpcl.bash"
    script.write_text(works("--tyro-print-completion", "bash")[0])

    def offered(*words):
        ask = f"""source {script}
COMP_WORDS=(cpcl {" ".join(map(repr, words))}); COMP_CWORD={len(words)}; COMP_LINE="cpcl {" ".join(words)}"
COMP_POINT=${{#COMP_LINE}}
complete -p cpcl >/dev/null && $(complete -p cpcl | sed 's/.*-F \\([^ ]*\\).*/\\1/') cpcl
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
        done = subprocess.run(
            ["bash", "--norc", "-c", ask], capture_output=True, text=True, check=True, env={}
        )
        return set(done.stdout.split())

    assert {"train", "settings"} <= offered("") and offered("tra") == {"train"}
    assert offered("train", "--ext") == {"--extend"}
    assert {"constant", "stretch"} <= offered("train", "--extend", "")
