"Several processes make the run of one: labels, memories, losses; and a process that dies ends the run."

import json, multiprocessing, os, signal, subprocess, sys, time

import numpy as np
import pytest
import torch

from cpcl.train.checkpoint import newest_state, read_history
from cpcl.synth.dataset import write_synth

# fp64: two orders of addition differ in the sixteenth digit, and two epochs later not in the ninth.
SETTINGS = [
    *"--pretrained none --height 48 --width 24 --epochs 2 --batch-size 15".split(),
    *"--set labels.image.k1=6 labels.caption.k1=6 optim.precision=fp64".split(),
]
# What a process does: `cpcl train`, noting what it saw of every epoch: labels, prototypes as they were left,
# which rows it encoded, who wrote what.
NOTED = """
import json, os, sys, torch
import cpcl.train.checkpoint, cpcl.train.compiled, cpcl.train.epoch, cpcl.train.loop, cpcl.train.runs

torch.set_num_threads(1)
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
notes, calls, steps, written = [], dict(labels=0, evaluated=0), [], []
walk, encode = cpcl.train.loop.train_epoch, cpcl.train.epoch.encode_batch
label, rank_all, keep = cpcl.train.loop._label, cpcl.train.runs.evaluate, cpcl.train.checkpoint.atomic_path

def noted_walk(model, optimizer, loader, memories, *args, **kwargs):
    assert args[1].num_processes == world == (torch.distributed.get_world_size() if world > 1 else 1)
    means = walk(model, optimizer, loader, memories, *args, **kwargs)
    labels = dict(labels_img=memories.labels_img.clone(), labels_txt=memories.labels_txt.clone())
    protos = dict(img=memories.img.protos.clone(), txt=memories.txt.protos.clone())
    row = means.terms | dict(lr=means.lr, gradient=means.gradient, skipped=means.skipped)
    notes.append(labels | protos | dict(row=row))
    return means

def noted_batch(model, share, *args, **kwargs):
    if os.environ.get("DIES") == f"{rank}" and len(steps) == 3:
        exec(os.environ["HOW"])
    batch = encode(model, share, *args, **kwargs)
    graph = batch.img.requires_grad and batch.txt.requires_grad
    steps.append(dict(mine=share["caption_row"].tolist(), all=batch.caption_row.tolist(), graph=graph))
    return batch

def noted_loss(value):
    loss = as_loss(value)
    steps[-1]["icpm"] = float(loss.terms["icpm"])
    return loss

def counted(name, function):
    def wrapper(*args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)
    return wrapper

def wrote(path):
    written.append(os.path.basename(path))
    return keep(path)

as_loss = cpcl.train.epoch.as_loss
cpcl.train.epoch.encode_batch, cpcl.train.epoch.as_loss = noted_batch, noted_loss
cpcl.train.loop.train_epoch, cpcl.train.loop._label = noted_walk, counted("labels", label)
cpcl.train.runs.evaluate = counted("evaluated", rank_all)
cpcl.train.checkpoint.atomic_path = wrote

cpcl.train.compiled.BACKEND = "aot_eager"  # compiles without a compiler

def main(words):
    from cpcl.cli import main
    code = main(words)
    if os.environ.get("NOTES"):
        found = dict(notes=notes, calls=calls, steps=steps, written=written, world=world)
        torch.save(found, f"{os.environ['NOTES']}/{world}-{rank}.pt")
    return code
"""
SCRIPT = NOTED + "sys.exit(main(json.loads(os.environ['WORDS'])))"
NOTEBOOK = """
import os
os.environ.update(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
from accelerate import notebook_launcher
def training(words):
    import torch
    torch.set_num_threads(1)
    from cpcl.encoder import EncoderConfig
    from cpcl.train import train_run
    root, out = words
    assert torch.distributed.is_initialized() is False
    encoder = EncoderConfig(pretrained="", height=48, width=24)
    changes = {"optim.epochs": 2, "optim.batch_size": 15, "optim.precision": "fp64", "optim.warmup": 1}
    train_run(root, out, encoder=encoder, changes=changes | {"labels.image.k1": 6, "labels.caption.k1": 6})
    assert torch.distributed.get_world_size() == 2
notebook_launcher(training, (WORDS,), num_processes=2, use_port="PORT")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "A set whose sizes nothing divides: a batch of 15 leaves a rest, and so do two or three processes."
    from cpcl.data.read import load_split

    root = write_synth(tmp_path_factory.mktemp("several") / "set", people=16, seed=12, splits=(11, 2, 3))
    raw = json.loads((root / "reid_raw.json").read_text())
    train = [r for r in raw if r["split"] == "train"]
    while len(train) % 2 == 0 or len(train) % 3 == 0:
        raw.remove(train.pop())
    train[-1]["captions"] = train[-1]["captions"][:1]
    captions = sum(len(r["captions"]) for r in train)
    for r in train[:-1]:
        if captions % 2 and captions % 3 and captions % 15:
            break
        if len(r["captions"]) > 1:
            r["captions"].pop()
            captions -= 1
    (root / "reid_raw.json").write_text(json.dumps(raw))
    split = load_split(root)
    assert (
        all(n % w for n in (len(split.images), len(split.captions)) for w in (2, 3))
        and len(split.captions) % 15
    )
    return root


def environment(**more):
    return os.environ | dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="1", **more)


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def launch(script, world, words, seconds=240, **more):
    "The script in `world` processes, by torchrun unless it is one."
    by = []
    if world > 1:
        by = ["-m", "torch.distributed.run", "--nproc_per_node", str(world), "--master_port", free_port()]
    return subprocess.run(
        [sys.executable, *by, str(script)],
        env=environment(WORDS=json.dumps(words), **more),
        capture_output=True,
        text=True,
        timeout=seconds,
    )


@pytest.fixture(scope="module")
def runs(root, tmp_path_factory):
    "The same training in 1 and 2 processes (3 where the test is slow): run folder, notes of every process."
    base = tmp_path_factory.mktemp("runs")
    script = base / "noted.py"
    script.write_text(SCRIPT)
    made = {}

    def _run(world, *more):
        key = world, *more
        if key not in made:
            folder = base / "-".join([f"{world}", *more])
            folder.mkdir()
            words = ["train", "--root", str(root), "--out", str(folder / "run"), *SETTINGS, *more]
            done = launch(script, world, words, NOTES=str(folder))
            assert done.returncode == 0, done.stderr
            notes = [torch.load(folder / f"{world}-{r}.pt") for r in range(world)]
            made[key] = folder / "run", notes
        return made[key]

    return _run


def same_training(runs, world, *more, both=()):
    "`more`: settings of the several processes; `both`: also of the one."
    (one, [alone]), (several, noted) = runs(1, *both), runs(world, *both, *more)
    assert alone["world"] == 1 and [n["world"] for n in noted] == [world] * world
    for n in noted:  # labels, memories and losses, on every rank
        for a, b in zip(alone["notes"], n["notes"], strict=True):
            assert all(torch.equal(a[k], b[k]) for k in ("labels_img", "labels_txt"))
            for m in ("img", "txt"):
                assert a[m].dtype == torch.float64 and a[m].shape == b[m].shape and len(a[m]) > 1
                assert (a[m] - b[m]).abs().max() < 1e-9
            assert set(a["row"]) == set(b["row"]) >= {"loss", "icpm", "pcm_v", "pcm_tv", "itc"}
            for k in a["row"]:
                assert abs(a["row"][k] - b["row"][k]) < 1e-9 * max(1, abs(a["row"][k])), k
    for rank in noted[1:]:  # memories are the same bits on all ranks
        for a, b in zip(noted[0]["notes"], rank["notes"]):
            assert torch.equal(a["img"], b["img"]) and torch.equal(a["txt"], b["txt"])
    for i, step in enumerate(alone["steps"]):  # ICPM sees the gathered batch, with its gradient
        mine = [n["steps"][i]["mine"] for n in noted]
        assert all(n["steps"][i]["all"] == step["all"] and n["steps"][i]["graph"] for n in noted)
        assert all(abs(n["steps"][i]["icpm"] - step["icpm"]) < 1e-9 for n in noted)
        assert {len(m) for m in mine} == {-(-len(step["all"]) // world)}
        assert set().union(*mine) == set(step["all"])
    assert {len(s["all"]) for s in alone["steps"]} == {15, len(alone["notes"][0]["labels_txt"]) % 15}
    assert [n["calls"]["labels"] for n in noted] == [2] + [0] * (world - 1)  # clustering once
    # two epochs' val, last and best on test
    assert [n["calls"]["evaluated"] for n in noted] == [4] + [0] * (world - 1)
    assert noted[0]["written"] and not any(n["written"] for n in noted[1:])  # rank 0 alone writes
    a, b = (json.loads((run / "result.json").read_text()) for run in (one, several))
    assert a == b and a["last"]["queries"] > 0
    for x, y in zip(read_history(one), read_history(several), strict=True):
        assert all(abs(x[k] - y[k]) < 1e-9 for k in ("val_R1", "val_mAP", "ari_img", "clusters_txt"))


SAME = (
    "1 and 2 processes give the same labels, memories and losses (float64, 1e-9), "
    "with a short last batch and sizes nothing divides"
)


def test_two_processes_make_the_same_run(runs, promise):
    promise(SAME)
    same_training(runs, 2)


@pytest.mark.slow
def test_two_processes_in_chunks_make_the_same_run(runs, promise):
    promise(SAME)
    same_training(runs, 2, "optim.chunk=3")


@pytest.mark.slow
def test_two_processes_with_compiled_towers_make_the_same_run(runs, promise):
    promise(SAME)
    same_training(runs, 2, "optim.compile=true", "optim.chunk=3")


@pytest.mark.slow
def test_two_processes_with_adapters_make_the_same_run(runs, promise):
    promise(SAME)
    same_training(runs, 2, "optim.chunk=3", both=["optim.lora=4"])


@pytest.mark.slow
def test_two_processes_scale_alike(runs, promise):
    promise("with float16, in chunks, two processes skip the same steps and keep the same scale and memories")
    half = "optim.precision=fp16"
    (one, [alone]), (two, noted) = runs(1, half), runs(2, half, "optim.chunk=3")
    for a, b in zip(noted[0]["notes"], noted[1]["notes"], strict=True):
        assert a["row"] == b["row"] and all(torch.equal(a[m], b[m]) for m in ("img", "txt"))
        assert a["row"]["skipped"] == 0
    scales = [newest_state(run)[1]["scaler"]["scale"] for run in (one, two)]
    assert scales[0] < 2.0**16 and scales[1] in (scales[0], scales[0] / 2)  # a rank's gradient is doubled
    first = [notes[0]["row"]["loss"] for notes in (alone["notes"], noted[0]["notes"])]
    assert abs(first[0] - first[1]) < 0.1 * first[0]  # another step may be skipped


@pytest.mark.slow
def test_three_processes_make_the_same_run(runs, promise):
    promise(SAME)
    same_training(runs, 3)


@pytest.mark.slow
def test_features_are_shared_and_in_row_order(root, tmp_path, promise):
    promise("features are encoded in shares and gathered in row order")
    script = tmp_path / "features.py"
    script.write_text("""
import json, os, torch
from cpcl.data import load_split
from cpcl.encoder import Encoder, EncoderConfig, features, load_encoder
from cpcl.train.processes import shared_features, start_processes

torch.set_num_threads(1)
torch.manual_seed(0)
accelerator, _ = start_processes()
assert accelerator.num_processes == torch.distributed.get_world_size() == 2
encoder = load_encoder(EncoderConfig(pretrained="", height=48, width=24)).double()
split = load_split(json.loads(os.environ["WORDS"]))
whole, rows, honest = features(encoder, split, batch_size=7), [], Encoder.encode_image
Encoder.encode_image = lambda self, x: rows.append(len(x)) or honest(self, x)
shared = shared_features(encoder, split, batch_size=7)
assert sum(rows) == len(range(accelerator.process_index, len(split.images), 2)), rows
for a, b in zip(whole, shared):
    assert a.shape == b.shape and abs(a - b).max() < 1e-12
""")
    done = launch(script, 2, str(root))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_resumed_by_two_processes(runs, root, tmp_path, promise):
    promise("a run that one process began goes on in two, the optimiser's state shared by the first")
    import shutil

    shutil.copytree(runs(1)[0], tmp_path / "run")
    os.replace(tmp_path / "run" / "state-before.safetensors", tmp_path / "run" / "state.safetensors")
    (tmp_path / "run" / "result.json").unlink()
    script = tmp_path / "noted.py"
    script.write_text(SCRIPT)
    done = launch(
        script, 2, ["train", "--root", str(root), "--out", str(tmp_path / "run"), "--resume", *SETTINGS]
    )
    assert done.returncode == 0, done.stderr
    for a, b in zip(read_history(runs(1)[0]), read_history(tmp_path / "run"), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-9 * a["loss"] and a["clusters_txt"] == b["clusters_txt"]


def _begin(rank, file):
    "Join two processes whose second group gives up after a second."
    from datetime import timedelta
    import cpcl.train.processes as processes

    processes.MEET = timedelta(seconds=1)
    _join(rank, file, 2)
    torch.distributed.barrier()
    return processes


def _join(rank, file, world):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)


def _waits(rank, file, say):
    "Wait for a clustering that is longer than the limit; then the same without what `once` does about it."
    processes = _begin(rank, file)

    def cluster():
        time.sleep(2)
        return "labels"

    say.send(processes.once(cluster))
    try:
        box = [cluster()] if rank == 0 else [None]
        torch.distributed.broadcast_object_list(box, group=processes.cpu_group())
    except RuntimeError as e:
        say.send(processes._reason(e))


def _dies(rank, file, say, victim):
    "One of two processes dies while the first clusters and the second waits."
    from cpcl.core import UserError

    processes = _begin(rank, file)
    processes.cpu_group()

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    try:
        with processes.others_needed():
            if rank == victim == 1:
                die()
            processes.once(lambda: time.sleep(1) or (victim == 0 and die()))
    except UserError as e:
        say.send(str(e))


def pair(target, tmp_path, *args, world=2):
    "Run a function in two processes: what each of them said, and its exit status."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cpcl.train.processes", "cpcl.search.build", "test_processes"])
    begun, meet = [], str(tmp_path / f"meet{time.perf_counter_ns()}")
    for rank in range(world):
        hear, say = context.Pipe(duplex=False)
        process = context.Process(target=target, args=(rank, meet, say, *args))
        process.start()
        say.close()
        begun.append((process, hear))
    return [_heard(*one) for one in begun]


def _heard(process, hear):
    process.join(60)
    assert process.exitcode is not None, "the process hangs"
    said = []
    while hear.poll():
        try:
            said.append(hear.recv())
        except EOFError:
            break
    return said, process.exitcode


def test_waiting_for_the_first_process_has_no_limit(tmp_path, promise):
    promise("processes wait for the first one's clustering longer than any limit of their groups")
    (first, _), (second, _) = pair(_waits, tmp_path)
    assert first[0] == second[0] == "labels"
    assert second[1].startswith("Timed out waiting 1000ms"), second  # there was a limit


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_while_another_waits(victim, tmp_path, promise):
    promise("a process that dies ends the others with one line, also while they wait for it")
    begin = time.perf_counter()
    found = pair(_dies, tmp_path, victim)
    assert found[victim] == ([], -signal.SIGKILL)
    ([line], status) = found[1 - victim]
    assert status == 0 and line.startswith("lost the other processes (") and "--resume" in line
    assert time.perf_counter() - begin < 30


@pytest.mark.parametrize(
    "rank, how, traceback",
    [
        ("1", "raise FloatingPointError('a rank broke')", "FloatingPointError: a rank broke"),
        pytest.param("0", "os.kill(os.getpid(), 9)", "Signal 9 (SIGKILL)", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_dies_ends_the_run(rank, how, traceback, root, tmp_path, promise):
    promise("a process that dies ends the run with its traceback, not a hang")
    script = tmp_path / "noted.py"
    script.write_text(SCRIPT)
    begin = time.perf_counter()
    done = launch(
        script,
        2,
        ["train", "--root", str(root), "--out", str(tmp_path / "run"), *SETTINGS],
        DIES=rank,
        HOW=how,
    )
    assert done.returncode != 0 and traceback in done.stderr, done.stderr
    assert time.perf_counter() - begin < 240
    lines = [line for line in done.stderr.splitlines() if line.startswith("cpcl")]
    assert len(lines) == 1 and ("lost the other processes" in lines[0] or "stopped by SIGTERM" in lines[0])


@pytest.mark.slow
def test_an_error_of_the_user_is_printed_once(root, tmp_path, promise):
    promise("bad input of several processes is said once")
    script = tmp_path / "noted.py"
    script.write_text(SCRIPT)
    done = launch(
        script,
        2,
        ["train", "--root", str(root), "--out", str(tmp_path / "run"), *SETTINGS, "hcm.tua=1"],
        seconds=120,
    )
    assert (
        done.returncode != 0 and sum(line.startswith("cpcl: ") for line in done.stderr.splitlines()) == 1
    ), done.stderr
    assert not (tmp_path / "run").exists()


def machines(tmp_path, *commands):
    "A training as on several machines, each with a torchrun and words of its own: (status, errors)."
    script = tmp_path / "noted.py"
    script.write_text(SCRIPT)
    meet = (
        f"--nnodes {len(commands)} --nproc_per_node 1 --rdzv_backend c10d --rdzv_id x --local_addr localhost"
    )
    by = [*meet.split(), "--rdzv_endpoint", f"localhost:{free_port()}"]
    begun = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *by, str(script)],
            env=environment(WORDS=json.dumps([str(w) for w in words])),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for words in commands
    ]
    return [(process.communicate(timeout=300)[1], process.returncode)[::-1] for process in begun]


@pytest.mark.slow
def test_two_machines_with_disks_of_their_own(runs, root, tmp_path, promise):
    promise("two torchruns, with data in different places and one run folder, make the run of one process")
    import shutil

    copy, train = shutil.copytree(root, tmp_path / "there"), ["train", *SETTINGS]
    here, there = (
        [*train, "--root", where, "--out", tmp_path / out] for where, out in ((root, "run"), (copy, "no"))
    )
    found = machines(tmp_path, here, there)
    assert [status for status, _ in found] == [0, 0], found
    assert not (tmp_path / "no").exists()
    for a, b in zip(read_history(runs(1)[0]), read_history(tmp_path / "run"), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-9 * a["loss"] and a["clusters_txt"] == b["clusters_txt"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["settings.seed", "data.train"])
def test_two_machines_that_differ(what, root, tmp_path, promise):
    promise("machines whose settings or data differ end with one line before anything is written")
    import shutil

    words = ["train", *SETTINGS, "--root", root, "--out", tmp_path / "run"]
    other = [*words, "--seed", "1"]
    if what == "data.train":
        copy = shutil.copytree(root, tmp_path / "there")
        annotation = copy / "reid_raw.json"
        annotation.write_text(annotation.read_text().replace("man", "woman", 1))
        other = [str(copy) if w == root else w for w in words]
    found = machines(tmp_path, words, other)
    assert all(status != 0 for status, _ in found), found
    said = [line for _, err in found for line in err.splitlines() if line.startswith("cpcl")]
    assert len(said) == 2 and all(f"has another {what} than the first process" in line for line in said), said
    assert not (tmp_path / "run" / "config.json").exists()


def execute(code, seconds=240):
    "Run code as the cells of a notebook, in a kernel."
    import nbclient, nbformat

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(book, timeout=seconds, kernel_name="python3").execute()


@pytest.mark.slow
def test_launched_from_a_notebook(runs, root, tmp_path, promise):
    promise("notebook_launcher in a kernel gives the run of torchrun")
    execute(NOTEBOOK.replace("WORDS", repr((str(root), str(tmp_path / "run")))).replace("PORT", free_port()))
    for a, b in zip(read_history(runs(2)[0]), read_history(tmp_path / "run"), strict=True):
        assert np.isclose(a["loss"], b["loss"], rtol=1e-9) and a["clusters_txt"] == b["clusters_txt"]


@pytest.mark.slow
def test_a_rank_that_dies_in_a_notebook(root, tmp_path, promise):
    promise("a process that dies ends the run with its traceback, not a hang")
    import nbclient

    broken = NOTEBOOK.replace(
        "root, out = words",
        "root, out = words\n    import cpcl.train.epoch, os\n"
        "    if os.environ['RANK'] == '1': cpcl.train.epoch.as_loss = lambda *a, **k: 1 / 0",
    )
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"):
        execute(
            broken.replace("WORDS", repr((str(root), str(tmp_path / "run")))).replace("PORT", free_port()),
            120,
        )


# --- an index that several processes build


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    "(a folder of 26 crops, one of them torn; a run folder with an untrained encoder)"
    from PIL import Image
    from cpcl.encoder import EncoderConfig, load_encoder, save_encoder
    from cpcl.train import make_config
    from cpcl.train.start import start_run

    base = tmp_path_factory.mktemp("gallery")
    (base / "crops").mkdir()
    for i in range(26):
        Image.new("RGB", (16, 40), (9 * i, 90, 250 - 9 * i)).save(base / "crops" / f"{i:02d}.jpg")
    (base / "crops" / "07.jpg").write_bytes(b"torn")
    start_run(base / "run", make_config("clip"), {})
    torch.manual_seed(0)
    encoder = load_encoder(EncoderConfig(pretrained="", height=48, width=24))
    save_encoder(encoder, base / "run" / "last.safetensors")
    return base / "crops", base / "run"


def _builds(rank, file, say, world, crops, run, out, how, dies):
    "Build an index; says how many images went through the encoder here, what was logged, what came back."
    import cpcl.search.shares
    from cpcl.encoder import Encoder
    from cpcl.search.build import build_index

    torch.set_num_threads(1)
    cpcl.search.shares.AT_ONCE = 16  # two pieces
    if world > 1:
        _join(rank, file, world)
    rows, lines, encode = [], [], Encoder.encode_image

    def counted(self, x):
        rows.append(len(x))
        if dies == (rank, len(rows)):
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(self, x)

    Encoder.encode_image = counted
    made = build_index(crops, run, out, log=lines.append, together=True, batch_size=4, **how)
    say.send((sum(rows), lines, made is None))


def built(tmp_path, gallery, world, out, dies=None, **how):
    "What `_builds` says, process by process."
    said = pair(_builds, tmp_path, world, *gallery, tmp_path / out, how, dies, world=world)
    assert dies or [status for _, status in said] == [0] * world, said
    return [one for ((one,), _) in said] if not dies else said


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".faiss", ".parquet")}


INDEX = "two processes build the index of one, file by file, each image encoded once"


def test_two_processes_build_the_index_of_one(gallery, tmp_path, promise):
    promise(INDEX, 2)
    [(rows, lines, nothing)] = built(tmp_path, gallery, 1, "one")
    (first, said, made), (second, silent, other) = built(tmp_path, gallery, 2, "two")
    assert (rows, first + second, made, other, silent) == (25, 25, False, True, [])
    assert first > 8 < second and said == lines and "1 unreadable (07.jpg)" in said[-1]
    assert len(files_of(tmp_path / "one")) == 2
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")  # names hold checksums
    again = built(tmp_path, gallery, 2, "two")
    assert [n for n, *_ in again] == [0, 0] and "0 encoded, 25 kept" in again[0][1][-1]


@pytest.mark.slow
@pytest.mark.parametrize("dies", [(0, 2), (1, 2)])
def test_a_build_of_two_processes_that_is_killed(dies, gallery, tmp_path, promise):
    promise("a build of two processes in which one is killed leaves the old index intact")
    import shutil
    from cpcl.search.build import open_store

    crops = shutil.copytree(gallery[0], tmp_path / "crops")
    for i in range(6, 26):
        (crops / f"{i:02d}.jpg").rename(tmp_path / f"{i:02d}.jpg")
    built(tmp_path, (crops, gallery[1]), 1, "index")
    before = files_of(tmp_path / "index")
    for i in range(6, 26):
        (tmp_path / f"{i:02d}.jpg").rename(crops / f"{i:02d}.jpg")
    found = built(tmp_path, (crops, gallery[1]), 2, "index", dies=dies)
    assert found[dies[0]][1] == -signal.SIGKILL and found[1 - dies[0]][1] == 1
    assert files_of(tmp_path / "index") == before and len(open_store(tmp_path / "index")[1]) == 6
    (_, lines, _), _ = built(tmp_path, (crops, gallery[1]), 2, "index")
    assert "19 encoded, 6 kept" in lines[-1]
    assert len(open_store(tmp_path / "index")[1]) == 25


@pytest.fixture
def server(tmp_path):
    "The address of a Milvus that answers on a port: Milvus Lite's engine, which several processes reach."
    from milvus_lite.server import Server

    port = free_port()
    milvus = Server(str(tmp_path / "server.db"), f"localhost:{port}")
    assert milvus.init() and milvus.start()
    yield f"http://localhost:{port}"
    milvus.stop()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "server"])
def test_two_processes_fill_a_store(kind, gallery, tmp_path, server, promise):
    promise("all processes add to a Milvus server, the first alone to a file of Milvus Lite; it goes on")
    from cpcl.search.build import open_store

    address = server if kind == "server" else str(tmp_path / "one.db")
    found = built(tmp_path, gallery, 2, "index", dies=(1, 3), store=f"milvus:{address}")
    assert found[1][1] == -signal.SIGKILL
    (first, lines, _), (second, _, _) = built(tmp_path, gallery, 2, "index", store=f"milvus:{address}")
    kept = 25 - first - second  # the first piece had reached the server
    assert kept >= 12 and f"{25 - kept} encoded, {kept} kept" in lines[-1], lines
    built(tmp_path, gallery, 1, "files")
    served, files = (open_store(tmp_path / name)[1] for name in ("index", "files"))
    paths = list(files.rows.path)
    assert list(served.table().path) == paths and len(served) == 25
    assert np.allclose(served.take(paths), files.take(paths), atol=1e-5)


@pytest.mark.slow
def test_an_index_from_the_shell(gallery, tmp_path, promise):
    promise(INDEX)
    built(tmp_path, gallery, 1, "one")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
            # torchrun has a --run-path and takes --run for its beginning, but not after a --
            *("--master_port", free_port(), "-m", "--", "cpcl.cli", "index", str(gallery[0])),
            *("--run", str(gallery[1]), "--out", str(tmp_path / "two"), "--batch-size", "4"),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next: cpcl search") == done.stdout.count("25 encoded") == 1, done.stdout
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
