"""Killed, stopped, out of disk, a damaged file: a resumed run ends like an uninterrupted one, bit for bit.

The folder for machine code is empty for the interrupted runs, two at a time.
"""

import json, multiprocessing, os, random, resource, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cpcl.train.checkpoint import newest_state, read_history
from cpcl.synth.dataset import write_synth

EPOCHS = 3
WORDS = [
    *"--pretrained none --height 48 --width 24 --batch-size 16".split(),
    *f"--epochs {EPOCHS} --set labels.image.k1=4 labels.caption.k1=6".split(),
]
# Where a process may die: at the n-th call of a function. "before" is at its entry, "half" after half of a
# file is written, "after" is when it has returned.
STAGES = {
    "reading images": ("cpcl.data.images.pixels_of", "before"),
    "encoding images": ("cpcl.encoder.towers.Encoder.encode_image", "after"),
    "encoding captions": ("cpcl.encoder.towers.Encoder.encode_text", "before"),
    "clustering": ("cpcl.cluster.labels.jaccard_graph", "after"),
    "mining": ("cpcl.train.labels.mine", "before"),
    "a step": ("cpcl.train.epoch.encode_batch", "after"),
    "the optimiser": ("torch.optim.Adam.step", "after"),
    "writing a file": ("safetensors.torch.save_file", "half"),
    "before a rename": ("os.replace", "before"),
    "after a rename": ("os.replace", "after"),
    "scoring": ("cpcl.train.runs.score_split", "before"),
}
BY_TIME = "at any moment"


def _patched(target, act):
    "Replace what `target` names by a wrapper; act(call number, when) runs before and after the call."
    name, _, attribute = target.rpartition(".")
    try:
        owner = __import__(name, fromlist=["x"])
    except ImportError:
        module, _, kind = name.rpartition(".")
        owner = getattr(__import__(module, fromlist=["x"]), kind)
    honest, count = getattr(owner, attribute), [0]

    def _wrapper(*args, **kwargs):
        if attribute == "replace" and str(args[1]).endswith((".nbi", ".nbc")):
            return honest(*args, **kwargs)  # machine code, which is written in the first run only
        count[0] += 1
        act(count[0], "before", args)
        found = honest(*args, **kwargs)
        act(count[0], "after", args)
        return found

    setattr(owner, attribute, _wrapper)


def _die():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(9)


def _train(words, plan=None, counts=None, after=None):
    "`cpcl train` in its own process: dies as planned, counts calls, or changes the machine after an epoch."
    import torch

    torch.set_num_threads(1)
    # loader processes start as in a process that a user starts, and Ctrl-C works as in a terminal
    multiprocessing.set_start_method("fork", force=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import cpcl.cli

    if plan:
        target, when, number = plan

        def _act(n, now, args):
            if n != number:
                return
            if when == "half" and now == "before":
                import safetensors.torch

                data = safetensors.torch.save(args[0])
                Path(args[1]).write_bytes(data[: len(data) // 2])
                _die()
            if when == now:
                _die()

        _patched(target, _act)
    if counts is not None:
        seen = {}
        for target in {t for t, _ in STAGES.values()}:
            _patched(target, lambda n, now, args, target=target: seen.__setitem__(target, n))
    if after:  # (part of a line, what to do then)
        import cpcl.train.loop

        honest = cpcl.train.loop.epoch_line

        def _line(row, epochs):
            if row.epoch == after[0]:
                after[1](words)
            return honest(row, epochs)

        cpcl.train.loop.epoch_line = _line
    code = cpcl.cli.main(["train", *words])
    if counts is not None:
        Path(counts).write_text(json.dumps(seen))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(words, log, code=None, **how):
    "A training in a process, its output in a file; imports are done before it starts, so it takes seconds."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cpcl.cli.program", "cpcl.train.runs", "open_clip", "test_kill"])
    process = context.Process(target=_logged, args=(words, str(log), code or CODE["folder"]), kwargs=how)
    process.start()
    return process


CODE = {}  # "folder": where a process keeps its machine code if it is not told another one
COLD = 3  # times as long takes a run that has to compile first


def _logged(words, log, code, **how):
    import numba

    os.environ["NUMBA_CACHE_DIR"] = numba.config.CACHE_DIR = str(code)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    _train(words, **how)


def ended(process, seconds=240):
    process.join(seconds)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "The set, what a run of it leaves behind, how often each function was called, and how long it took."
    base = tmp_path_factory.mktemp("kill")
    root = write_synth(base / "set", people=12, seed=11, splits=(8, 2, 2))
    begin, CODE["folder"] = time.perf_counter(), os.environ.get("NUMBA_CACHE_DIR", "")
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # the server that all processes come from has one thread: two at a time would only wait for each other
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
            patch.setenv(name, "1")
        first = start(
            ["--root", str(root), "--out", str(base / "run"), *WORDS],
            base / "log",
            counts=str(base / "counts"),
        )
    assert ended(first) == 0, (base / "log").read_text()
    return dict(
        root=root,
        left=left(base / "run"),
        counts=json.loads((base / "counts").read_text()),
        seconds=time.perf_counter() - begin,
        base=base,
    )


def left(run):
    "What a finished run leaves: scores and weights as bytes, history without seconds, names of all files."
    files = {
        name: (run / name).read_bytes() for name in ("result.json", "last.safetensors", "best.safetensors")
    }
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in read_history(run)]
    return files | dict(
        history=history, names=sorted(p.name for p in run.iterdir() if p.name != "tensorboard")
    )


def same(run, undisturbed):
    found = left(run)
    for k, v in undisturbed["left"].items():
        assert found[k] == v, k
    return True


def resume(run, undisturbed, code=None):
    log = run.parent / "resumed"
    words = ["--root", str(undisturbed["root"]), "--out", str(run), "--resume", *WORDS]
    assert ended(start(words, log, code)) == 0, log.read_text()
    return same(run, undisturbed)


def kill(stage, draw, run, undisturbed, code=None):
    "Start a run, kill it in a stage at a point that `draw` chooses; where it died."
    words, log = ["--root", str(undisturbed["root"]), "--out", str(run), *WORDS], run.parent / "log"
    if stage == BY_TIME:
        wait = draw.uniform(0.05, 0.95) * undisturbed["seconds"] * (COLD if code else 1)
        process = start(words, log, code)
        process.join(wait)
        process.kill()
        assert ended(process) in (-9, 0)
        return f"after {wait:.2f} s"
    target, when = STAGES[stage]
    number = draw.randint(1, undisturbed["counts"][target])
    assert ended(start(words, log, code, plan=(target, when, number))) == -9, log.read_text()
    return f"{target} call {number} of {undisturbed['counts'][target]}, {when}"


QUICK = ["clustering", "a step", "writing a file"]
POINTS = [
    (stage, i)
    for stage in (*STAGES, BY_TIME)
    for i in range(2 if stage != BY_TIME else 4)
    if (stage, i) not in [(q, 0) for q in QUICK]
]


@pytest.fixture(scope="module")
def disturbed(undisturbed, tmp_path_factory):
    "The interruptions of `make test`, two at a time: stage or signal -> a future, true if nothing was lost."
    code = tmp_path_factory.mktemp("code")

    def _killed(stage, base):
        where = kill(stage, random.Random(f"{stage} 0"), base / "run", undisturbed, code)
        return where, resume(base / "run", undisturbed, code)

    def _stopped(which, base):
        return stop(which, base / "run", undisturbed, code), resume(base / "run", undisturbed, code)

    jobs = [(_killed, s) for s in QUICK] + [(_stopped, s) for s in SIGNALS]
    with ThreadPoolExecutor(2) as pool:
        return {what: pool.submit(job, what, tmp_path_factory.mktemp("disturbed")) for job, what in jobs}


@pytest.mark.parametrize("stage", QUICK)
def test_killed_and_resumed(stage, disturbed, promise):
    promise(
        "a run killed at any point and resumed gives the same result.json, weights and history, bit for bit"
    )
    where, same = disturbed[stage].result()
    print(where)
    assert same


@pytest.mark.slow
@pytest.mark.parametrize("stage, i", POINTS)
def test_killed_at_more_points(stage, i, tmp_path, undisturbed, promise):
    promise(
        "a run killed at any point and resumed gives the same result.json, weights and history, bit for bit"
    )
    code = tmp_path / "code" if stage == BY_TIME and i % 2 else None
    print(kill(stage, random.Random(f"{stage} {i}"), tmp_path / "run", undisturbed, code))
    assert resume(tmp_path / "run", undisturbed, code)


@pytest.mark.slow
def test_killed_again_and_again(tmp_path, undisturbed, promise):
    promise("a run killed again and again goes on each time", cases=6)
    draw, run, code = random.Random(7), tmp_path / "run", tmp_path / "code"
    words = ["--root", str(undisturbed["root"]), "--out", str(run), "--resume", *WORDS]
    for _ in range(6):
        process = start(words, tmp_path / "log", code)
        process.join(draw.uniform(0.2, 0.6) * undisturbed["seconds"] * COLD)
        process.kill()
        assert ended(process) in (-9, 0)
    assert resume(run, undisturbed, code)


SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}


def stop(which, run, undisturbed, code):
    "Send a run a signal in its second epoch: it exits as it should, state intact, nothing half-written."
    log = run.parent / "log"
    words = ["--root", str(undisturbed["root"]), "--out", str(run), *WORDS]
    process = start(words, log, code, after=(0, _Later(which)))
    assert ended(process) == SIGNALS[which], log.read_text()
    said = log.read_text().splitlines()
    assert (
        said[-1].startswith("cpcl: stopped") and "--resume" in said[-1] and "Traceback" not in log.read_text()
    )
    assert 1 <= newest_state(run)[1]["epoch"] < EPOCHS and not (run / "result.json").exists()
    assert not list(run.glob(".cpcl-part-*"))
    return True


@pytest.mark.parametrize("which", SIGNALS)
def test_stopped_by_a_signal(which, disturbed, promise):
    promise(
        "Ctrl-C and SIGTERM exit with 130 and 143, keep the last epoch, and resuming repeats the broken one"
    )
    assert disturbed[which].result() == (True, True)


class _Later:
    "Send this process a signal a little after an epoch's line, that is, in the middle of the next epoch."

    def __init__(self, which):
        self.which = which

    def __call__(self, words):
        import threading

        threading.Timer(0.3, os.kill, (os.getpid(), self.which)).start()


def _no_more_bytes(words):
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, resource.RLIM_INFINITY))


def _fill_the_disk(words):
    "All but five megabytes of the disk that the run folder lies on."
    run = Path(words[words.index("--out") + 1])
    free = os.statvfs(run)
    with open(run.parent / "filler", "wb") as f:
        f.write(b"\0" * (free.f_bavail * free.f_frsize - 5_000_000))


def test_a_file_that_may_not_grow(tmp_path, undisturbed, promise):
    promise("a full disk stops a run with a message and leaves the checkpoint before whole")
    run, log = tmp_path / "run", tmp_path / "log"
    assert (
        ended(
            start(
                ["--root", str(undisturbed["root"]), "--out", str(run), *WORDS],
                log,
                after=(0, _no_more_bytes),
            )
        )
        == 2
    ), log.read_text()
    out_of_room(run, log, "File too large")
    assert resume(run, undisturbed)


@pytest.mark.slow
def test_a_full_disk(tmp_path, undisturbed, promise):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600m", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("only root may mount a small disk")
    promise("a full disk stops a run with a message and leaves the checkpoint before whole")
    run, log = disk / "run", tmp_path / "log"
    try:
        assert (
            ended(
                start(
                    ["--root", str(undisturbed["root"]), "--out", str(run), *WORDS],
                    log,
                    after=(0, _fill_the_disk),
                )
            )
            == 2
        ), log.read_text()
        out_of_room(run, log, "No space left on device")
        (disk / "filler").unlink()
        assert resume(run, undisturbed)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def out_of_room(run, log, why):
    said = log.read_text().splitlines()
    assert (
        said[-1].startswith("cpcl: cannot write")
        and why in said[-1]
        and "--resume" in said[-1]
        and "Traceback" not in log.read_text()
    )
    assert newest_state(run)[1]["epoch"] == 1 and not list(run.glob(".cpcl-part-*"))


@pytest.mark.parametrize(
    "torn",
    [
        "state.safetensors",
        *(
            pytest.param(names, marks=pytest.mark.slow)
            for names in ("last.safetensors", "history.jsonl", "state.safetensors state-before.safetensors")
        ),
    ],
)
def test_a_torn_file(torn, tmp_path, undisturbed, promise):
    promise("where a disk tore the newest checkpoint, the newest whole one is used")
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(
        ["--root", str(undisturbed["root"]), "--out", str(run), *WORDS],
        log,
        after=(1, _Later(signal.SIGKILL)),
    )
    assert ended(process) == -9
    assert newest_state(run)[1]["epoch"] == 2
    for name in torn.split():
        (run / name).write_bytes((run / name).read_bytes()[:-100])
    assert resume(run, undisturbed)
    said = (tmp_path / "resumed").read_text()
    assert ("not a complete training state" in said) == ("state" in torn)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_same_numbers_with_loader_workers(workers, tmp_path, undisturbed, promise):
    promise("the same seed gives the same numbers to the last digit, with 0, 1 and 2 loader processes")
    run, log = tmp_path / "run", tmp_path / "log"
    assert (
        ended(
            start(
                ["--root", str(undisturbed["root"]), "--out", str(run), "--workers", str(workers), *WORDS],
                log,
            )
        )
        == 0
    ), log.read_text()
    assert same(run, undisturbed)
    told = json.loads((run / "environment.json").read_text())
    assert (
        all(told[k] for k in ("python", "torch", "open_clip", "numpy", "device", "command"))
        and "commit" in told
        and "--workers" not in told["commit"]
    )
