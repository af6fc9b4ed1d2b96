"Loader processes that cannot start, have no room, are killed or stopped: one line, never a hang."

import contextlib, faulthandler, multiprocessing, os, random, resource, signal, subprocess, sys
import threading, time
from collections import Counter

import pytest
import torch
from torch.utils.data import Dataset, get_worker_info

from cpcl.core import UserError
from cpcl.data.batches import caption_loader, image_loader, pair_loader
from cpcl.data.read import load_split
from cpcl.data.workers import Loader
from cpcl.synth.dataset import write_synth
from readme import ROOT

ROOM = "too little shared memory for the loader processes ends in one line, before or when it is full"
DEATH = "a loader process that is killed at any moment ends the run in one line"
STOP = "Ctrl-C and SIGTERM for a training and its loader processes together end it in one line"


class Rows(Dataset):
    "Small images, and something that happens in a loader process at each."

    row_bytes = 3 * 32 * 32 * 4

    def __init__(self, act=lambda row: None, n=240):
        self.act, self.n = act, n

    def __len__(self):
        return self.n

    def __getitem__(self, row):
        if get_worker_info():
            self.act(row)
        return {"image": torch.full((3, 32, 32), float(row))}


def stack(rows):
    return {"image": torch.stack([row["image"] for row in rows])}


def images(workers, act=lambda row: None):
    return torch.cat([batch["image"] for batch in Loader(Rows(act), stack, workers, batch_size=8)])


# --- what arrives


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return load_split(write_synth(tmp_path_factory.mktemp("set") / "set", people=8, seed=1, splits=(6, 1, 1)))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_batches(workers, split):
    size, state = (48, 24), torch.get_rng_state()
    for make in (
        lambda w: pair_loader(split, size, 5, workers=w),
        lambda w: image_loader(split, size, 5, workers=w),
        lambda w: caption_loader(split, 5, workers=w),
    ):
        here, there = list(make(0)), list(make(workers))
        assert len(here) == len(there) == len(make(workers))
        for a, b in zip(here, there):
            assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(torch.get_rng_state(), state)


class TwoFields(Exception):
    "One that cannot be unpickled, as many people's."

    def __init__(self, a, b):
        super().__init__(f"{a} {b}")


@pytest.mark.parametrize(
    "error",
    [
        UserError("one line"),
        FileNotFoundError(2, "No such file or directory", "a.jpg"),
        UnicodeDecodeError("utf8", b"\xff", 0, 1, "invalid start byte"),
        KeyError("a"),
        TwoFields(1, 2),
    ],
    ids=lambda e: type(e).__name__,
)
def test_an_exception_keeps_its_type(error, promise):
    promise("an error in a loader process is the same error as without loader processes")

    def fail(row):
        raise error

    with pytest.raises(Exception) as found:
        images(2, fail)
    if isinstance(error, TwoFields):
        assert type(found.value) is RuntimeError and "TwoFields: 1 2" in str(found.value)
    else:
        assert (type(found.value), found.value.args) == (type(error), error.args)
        assert getattr(found.value, "filename", None) == getattr(error, "filename", None)


def test_a_damaged_image(split, tmp_path, promise):
    "The line of `read_image`, not a traceback with it."
    promise("an error in a loader process is the same error as without loader processes")
    file = split.root / "imgs" / split.images[0]
    file = file if file.is_file() else next(split.root.rglob(split.images[0].rsplit("/", 1)[-1]))
    whole = file.read_bytes()
    file.write_bytes(b"no image")
    lines = []
    try:
        for workers in (0, 2):
            with pytest.raises(UserError) as found:
                list(image_loader(split, (48, 24), 5, workers=workers))
            lines.append(str(found.value))
    finally:
        file.write_bytes(whole)
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 1


# --- death


SILENT = [False]  # whether forked processes end by SIGSEGV without the stack that pytest has printed
os.register_at_fork(after_in_child=lambda: SILENT[0] and faulthandler.disable())


@pytest.fixture
def no_trace():
    "The stacks of processes ended on purpose look as if the tests had crashed; that of a real crash stays."
    SILENT[0] = True
    yield
    SILENT[0] = False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_killed_at_any_moment(how, no_trace, promise):
    "A thread kills one of two processes at a random moment, while batches are waited for or used."
    draw, ends, tries = random.Random(int(how)), Counter(), 12

    def kill(wait):
        time.sleep(wait)
        for process in multiprocessing.active_children()[:1]:
            os.kill(process.pid, how)

    for _ in range(tries):
        killer = threading.Thread(target=kill, args=[draw.uniform(0, 0.25)])
        killer.start()
        try:
            for batch in Loader(Rows(lambda row: time.sleep(0.002)), stack, 2, batch_size=8):
                torch.nn.functional.conv2d(batch["image"], torch.ones(4, 3, 3, 3))
            ends["complete"] += 1
        except UserError as e:
            ends[str(e).split(" (")[0]] += 1
        killer.join()
    assert set(ends) <= {"complete", "a loader process was killed"} and ends.total() == tries, ends
    assert ends["complete"] < tries
    assert not multiprocessing.active_children()
    promise(DEATH, cases=tries)


def test_a_process_that_ends_by_itself(promise):
    promise(DEATH, cases=2)
    for status in (0, 3):
        with pytest.raises(UserError, match="a loader process was killed"):
            images(2, lambda row: row == 100 and os._exit(status))


def test_a_batch_that_cannot_be_sent(promise):
    promise(DEATH)
    begin = time.perf_counter()
    with pytest.raises(UserError, match="a loader process was killed"):
        list(Loader(Rows(), lambda rows: dict(function=lambda: rows), 1, batch_size=8))
    assert time.perf_counter() - begin < 30


def test_silence(monkeypatch, promise):
    promise(DEATH)
    monkeypatch.setattr("cpcl.data.workers.LOOK", 0.2)
    monkeypatch.setattr("cpcl.data.workers.PATIENCE", 1)
    begin = time.perf_counter()
    with pytest.raises(UserError, match="no batch from the loader processes"):
        images(1, lambda row: time.sleep(60))
    assert time.perf_counter() - begin < 30


def test_nothing_is_left_behind():
    "A loader that is left in the middle takes its processes with it."
    batches = iter(Loader(Rows(), stack, 2, batch_size=8))
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    del batches
    assert not multiprocessing.active_children()


# --- room

SMALL = """
import sys
import torch
sys.path.insert(0, {tests!r})
from test_loaders import Rows, stack
from cpcl.core import UserError
from cpcl.data.workers import Loader

data = Rows()
data.row_bytes = {row_bytes}
try:
    print(sum(len(b["image"]) for b in Loader(data, stack, 2, batch_size=64)))
except UserError as e:
    print(e)
"""
LEAVES = [  # bytes of shared memory, what the loader thinks that a row takes, what is to be seen
    (
        "2m",
        Rows.row_bytes,
        "shared memory is full (/dev/shm 2 MB, 3 MB needed): start the container with --shm-size=2g",
    ),
    ("1m", 0, "shared memory is full (/dev/shm 1 MB): start the container with --shm-size=2g"),
    ("8k", 0, "shared memory is full"),
    ("64m", Rows.row_bytes, "240"),
]


@pytest.mark.parametrize("size, row_bytes, line", LEAVES, ids=[f"{s}-{r}" for s, r, _ in LEAVES])
def test_little_shared_memory(size, row_bytes, line, promise):
    "With the size known before, and with a memory that others fill meanwhile (as if the rows had no size)."
    script = SMALL.format(tests=str(ROOT / "tests"), row_bytes=row_bytes)
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    inside = ["unshare", "-m", "sh", "-c", f'{mount} || exit 77; "$0" -c "$1"', sys.executable, script]
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    try:
        done = subprocess.run(inside, capture_output=True, text=True, timeout=120, env=env)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("only root may mount a small shared memory")
    assert done.stdout.startswith(line) and len(done.stdout.splitlines()) == 1, done.stdout + done.stderr
    promise(ROOM)


def test_no_room_for_open_files(promise):
    "In a loader process, and in the process that trains."
    promise(ROOM, cases=2)
    with pytest.raises(UserError, match="ulimit -n"):
        images(2, lambda row: resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8)))
    free = resource.getrlimit(resource.RLIMIT_NOFILE)
    batches = iter(Loader(Rows(), stack, 2, batch_size=8))
    next(batches)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, free[1]))
        with pytest.raises(UserError, match="ulimit -n"):
            list(batches)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, free)


# --- the command

WORDS = (
    "--pretrained none --preset clip --height 48 --width 24 --batch-size 8 --epochs 40 --workers 2".split()
)


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    return write_synth(tmp_path_factory.mktemp("set") / "set", people=12, seed=11, splits=(8, 2, 2))


def children_of(pid):
    "The loader processes of a training."
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as f:
            return [int(p) for p in f.read().split()]
    except OSError:
        return []


def start_training(root, run):
    "A training in a group of its own, in its second epoch or later, with loader processes."
    words = [sys.executable, "-m", "cpcl.cli", "train", "--root", str(root), "--out", str(run), *WORDS]
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        words,
        stdout=pipe,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=env,
        start_new_session=True,
    )
    until = time.monotonic() + 120
    while not (run / "last.safetensors").is_file() and time.monotonic() < until:
        time.sleep(0.05)
    return process


def ending(process):
    "Exit status, and what was printed beside progress bars and the lines of epochs."
    said = process.communicate(timeout=120)[0].replace("\r", "\n").splitlines()
    chance = "  a caption is hardly more like"  # a remark that so small a set may earn
    other = ("epoch ", chance, "  warn", "UserWarning")
    rest = [s for s in said if s.strip() and "%|" not in s and not s.startswith(other)]
    return process.returncode, [s for s in rest if "check_worker" not in s and "suggested max" not in s]


@pytest.mark.skipif(not os.path.exists(f"/proc/self/task/{os.getpid()}/children"), reason="needs /proc")
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_ends_a_training(how, small_set, tmp_path, promise):
    "One that has made its last batch of an epoch is not missed, so there is another try until the end."
    promise(DEATH)
    process = start_training(small_set, tmp_path / "run")
    until = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < until:
        for worker in children_of(process.pid)[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, how)
        time.sleep(0.1)
    line = "cpcl: a loader process was killed (out of memory?): use fewer --workers, or --workers 0"
    assert ending(process) == (2, [line])


@pytest.mark.parametrize("i", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 8))])
@pytest.mark.parametrize(
    "status, how", [pytest.param(143, signal.SIGTERM, marks=pytest.mark.slow), (130, signal.SIGINT)]
)
def test_a_signal_for_all_processes(i, how, status, small_set, tmp_path, promise):
    "At a random moment: in a step, while processes start or end, between epochs."
    promise(STOP)
    process = start_training(small_set, tmp_path / "run")
    time.sleep(random.Random(i).uniform(0, 2))
    os.killpg(process.pid, how)
    found, lines = ending(process)
    assert found == status and len(lines) == 1 and lines[0].startswith("cpcl: stopped"), (found, lines)
