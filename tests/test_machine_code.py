"Machine code on disk: never stale, never in the way; and clustering in threads and in forked processes."

import itertools, os, re, signal, subprocess, sys, time

import numpy as np
import pytest

from cpcl.cluster import dbscan, dots, eps, jaccard, kernels, tiles
from cpcl.cluster.dots import pair_dots
from cpcl.cluster.eps import auto_eps, eps_curve
from cpcl.cluster.knn import knn
from cpcl.cluster.labels import LABELLERS, ClusterConfig, pseudo_labels
from cpcl.cluster.machine_code import KEPT, machine_code
from cpcl.core import unit
from readme import ROOT

DISK = "machine code on disk that is cut short, foreign, stale or half written never changes or breaks a run"
START = "a first clustering may be stopped at any moment, and two may start at once"
FORKS = "clustering in threads and in forked processes gives its labels or one line, and never hangs"


def people(n=300, d=32):
    "Sixty people of five rows for the default n."
    r = np.random.default_rng(0)
    centre = np.repeat(r.standard_normal((n // 5, d)), 5, 0)
    return unit((centre + 0.3 * r.standard_normal((n, d))).astype("float32"))


# --- what is on disk


@pytest.fixture
def disk(tmp_path, monkeypatch):
    "An empty folder for machine code."
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    return tmp_path


def pair(step=1):
    "A compiled function and the helper that it calls, new each time, as in a new process."
    world = dict(machine_code=machine_code, STEP=step, __name__="a_module")
    exec(PAIR, world)
    return world["outer"], world["helper"]


PAIR = """
@machine_code
def helper(x):
    return x + STEP

@machine_code
def outer(x):
    return 2 * helper(x)
"""


def hits(*functions):
    return [sum(f.stats.cache_hits.values()) for f in functions]


def files(disk):
    return sorted(p for p in disk.rglob("*") if p.is_file())


def damages(right, other):
    "Contents that a file may have instead of the right one."
    cuts = [right[:n] for n in (0, 1, 31, 32, 33, 100, len(right) // 2, len(right) - 1)]
    flipped = [bytes([*right[:n], right[n] ^ 1, *right[n + 1 :]]) for n in (0, 32, len(right) // 2)]
    return [*cuts, *flipped, right + b"\0", bytes(len(right)), b"\x80\x04]", other]


def test_damaged_files(disk, promise):
    outer, helper = pair()
    assert (outer(5), helper(5), hits(outer, helper)) == (12, 6, [0, 0])
    (a, b), cases = files(disk), 0
    for file, other in ((a, b), (b, a)):
        right = file.read_bytes()
        for wrong in damages(right, other.read_bytes()):
            file.write_bytes(wrong)
            outer, helper = pair()
            assert (outer(5), helper(5)) == (12, 6)
            assert sorted(hits(outer, helper)) == [0, 1], "the other file is still used, this one is not"
            outer, helper = pair()
            assert (outer(5), helper(5), hits(outer, helper)) == (12, 6, [1, 1]), "and it was written again"
            cases += 1
    promise(DISK, cases=cases)


def test_files_that_are_no_files(disk, promise):
    promise(DISK, cases=2)
    outer, helper = pair()
    outer(5)
    for file in files(disk):
        file.unlink()
        file.mkdir()
    for _ in range(2):
        outer, helper = pair()
        assert (outer(5), helper(5), hits(outer, helper)) == (12, 6, [0, 0])
    (folder,) = {f.parent for f in disk.rglob("*.nbc")}
    folder.rename(disk / "away")
    folder.write_text("a file where the folder should be")
    outer, helper = pair()
    assert (outer(5), helper(5)) == (12, 6)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only(disk, promise):
    promise(DISK)
    disk.chmod(0o500)
    assert pair()[0](5) == 12
    disk.chmod(0o700)


def test_a_full_disk(tmp_path, monkeypatch, promise):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    promise(DISK)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(small))
    try:
        for _ in range(2):
            outer, helper = pair()
            assert (outer(5), outer(5.0), helper(np.float32(5))) == (12, 12, 6)
        assert all(f.stat().st_size for f in files(small)), "what did not fit leaves nothing behind"
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_what_the_code_depends_on(disk, promise):
    "A value that the helper reads, changed and changed back, and each type of argument."
    promise(DISK, cases=7)
    for step, known in ((1, 0), (2, 0), (1, 1), (3.5, 0), (2, 1)):
        outer, helper = pair(step)
        assert (outer(5), hits(outer)) == (2 * (5 + step), [known])
    for x in (np.float32(1), np.int8(1)):
        assert pair()[0](x) == 4


def test_old_code_does_not_pile_up(disk):
    for step in range(KEPT + 5):
        pair(step)[0](1)
    assert len(files(disk)) == 2 * KEPT


# --- in processes


def run(script, folder, path=(), **environment):
    "Start Python with a script, its machine code in `folder`."
    env = os.environ | dict(NUMBA_CACHE_DIR=str(folder), PYTHONUNBUFFERED="1", TQDM_DISABLE="1") | environment
    env["PYTHONPATH"] = os.pathsep.join([*map(str, path), str(ROOT)])
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", script], env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def said(process, seconds=240):
    out = process.communicate(timeout=seconds)[0]
    assert process.returncode == 0, out
    return out.split()


TWO_FILES = "import main; print(main.outer(5), sum(main.outer.stats.cache_hits.values()))"
HELPER = "from cpcl.cluster.machine_code import inlined\n@inlined\ndef helper(x):\n    return x + {}\n"
MAIN = "from cpcl.cluster.machine_code import inlined\nfrom helper import helper\n"
MAIN += "@inlined\ndef outer(x):\n    return 2 * helper(x)\n"


@pytest.mark.slow
def test_a_helper_in_another_file(tmp_path, promise):
    "The helper changes; the file of the function that calls it does not."
    promise(DISK, cases=3)
    (tmp_path / "main.py").write_text(MAIN)
    for step, known in ((1, 0), (1, 1), (100, 0)):
        (tmp_path / "helper.py").write_text(HELPER.format(step))
        assert said(run(TWO_FILES, tmp_path / "code", [tmp_path])) == [str(2 * (5 + step)), str(known)]


CELLS = """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in ({first!r}, {second!r}, "print(outer(5), sum(outer.stats.cache_hits.values()))"):
    assert shell.run_cell(cell).success
"""


@pytest.mark.slow
def test_cells_of_two_notebooks(tmp_path, promise):
    "Two notebooks have the same cell and another helper, from a module that only one of them has."
    promise(DISK, cases=3)
    second = (
        "from cpcl.cluster.machine_code import inlined\n@inlined\ndef outer(x):\n    return 2 * helper(x)"
    )
    for name, step, known in (("old_layout", 1, 0), ("new_layout", 10, 0), ("new_layout", 10, 1)):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(HELPER.format(step))
        script = CELLS.format(first=f"from {name} import helper", second=second)
        home = dict(IPYTHONDIR=str(tmp_path / "ipython"))
        assert said(run(script, tmp_path / "code", [folder], **home))[-2:] == [
            str(2 * (5 + step)),
            str(known),
        ]


@pytest.mark.slow
def test_two_first_starts_with_other_types(tmp_path, promise):
    "Both at once into one empty folder, then both again: each finds its own."
    promise(START, cases=2)
    (tmp_path / "helper.py").write_text(HELPER.format(1))
    (tmp_path / "main.py").write_text(MAIN)
    scripts = [TWO_FILES.replace("(5)", f"({x})") for x in ("5", "5.0")]
    for known in (0, 1):
        started = [run(script, tmp_path / "code", [tmp_path]) for script in scripts]
        assert [said(p) for p in started] == [["12", str(known)], ["12.0", str(known)]]


CLUSTER = """
import numpy as np
from cpcl.cluster import kernels
from cpcl.cluster.labels import pseudo_labels
from cpcl.core import unit
r = np.random.default_rng(0)
x = np.repeat(r.standard_normal((60, 32)), 5, 0) + 0.3 * r.standard_normal((300, 32))
x = unit(x.astype("float32"))
print("start", flush=True)
print(pseudo_labels(x, k1=6, k2=2, eps=0.5, min_samples=2).max() + 1)
print(sum(kernels.near_rows.kernel.stats.cache_hits.values()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("after", [0.1, 1, 3, 5, 7, 9])
def test_a_stopped_first_start(after, how, tmp_path, promise):
    promise(START)
    first = run(CLUSTER, tmp_path)
    assert first.stdout.readline() == "start\n"
    time.sleep(after)
    first.send_signal(how)
    first.communicate(timeout=60)
    assert said(run(CLUSTER, tmp_path))[:2] == ["start", "60"]
    assert said(run(CLUSTER, tmp_path)) == ["start", "60", "1"]


@pytest.mark.slow
def test_two_first_starts_of_the_clustering(tmp_path, promise):
    promise(START, cases=4)
    other = CLUSTER.replace("k1=6", "k1=np.int32(6)").replace("eps=0.5", "eps=np.float32(0.5)")
    started = [run(script, tmp_path) for script in (CLUSTER, other)]
    assert [said(p)[:2] for p in started] == [["start", "60"]] * 2
    assert [said(run(script, tmp_path)) for script in (CLUSTER, other)] == [["start", "60", "1"]] * 2


@pytest.mark.slow
def test_each_file_of_the_clustering_cut_short(tmp_path, promise):
    "All of them at once, each at another length."
    said(run(CLUSTER, tmp_path))
    found = files(tmp_path)
    promise(DISK, cases=len(found))
    for i, file in enumerate(found):
        data = file.read_bytes()
        file.write_bytes(data[: len(data) * i // len(found)])
    assert said(run(CLUSTER, tmp_path)) == ["start", "60", "0"]
    assert said(run(CLUSTER, tmp_path)) == ["start", "60", "1"]


# --- types of numbers


def kinds(value):
    "A number in the types that people have it in."
    if isinstance(value, int):
        return [t(value) for t in (np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64)]
    return [t(value) for t in (np.float16, np.float32, np.float64)]


def compiled_so_far():
    found = [getattr(f, "kernel", f) for m in (dbscan, dots, eps, kernels, tiles) for f in vars(m).values()]
    return {f.py_func.__qualname__: len(f.signatures) for f in found if hasattr(f, "py_func")}


def results(x, k1, two, radius):
    "What the public functions of the clustering give for numbers of these types."
    near = knn(x, k1)[0]
    graph = jaccard.jaccard_graph(near, x, k1, two, radius)
    yield from (near, graph.data, graph.indices, graph.indptr)
    yield from (
        dots.closest(x, [0], near[:1], two)[0],
        jaccard.reciprocal(near, k1),
        tiles.tiled_knn(x, k1)[0],
    )
    yield pseudo_labels(x, k1, two, radius, two)
    yield pseudo_labels(x, k1, two, "auto", two, labeller="hdbscan")
    yield auto_eps(graph, two)
    yield eps_curve(graph, two).clusters
    for labeller in LABELLERS.values():
        yield labeller(graph, radius, two)


def test_types_of_numbers(promise):
    x = people()
    want = list(results(x, 6, 2, 0.5))
    before, given = compiled_so_far(), [(k, two, 0.5) for k, two in zip(kinds(6), kinds(2))]
    given += [(6, 2, radius) for radius in kinds(0.5)]
    for k1, two, radius in given:
        assert all(map(np.array_equal, results(x, k1, two, radius), want))
        cfg = ClusterConfig(k1, two, radius, two)
        assert [type(v) for v in (cfg.k1, cfg.k2, cfg.eps, cfg.min_samples)] == [int, int, float, int]
    assert compiled_so_far() == before, "another type of number was compiled for itself"
    promise("k1, k2, eps and min_samples in every type of number give the same labels", cases=len(given))


# --- threads and forks

FORK = """
import multiprocessing, os, sys
from concurrent.futures import ThreadPoolExecutor
import numba, numpy as np, torch
from cpcl.cluster.labels import pseudo_labels
from cpcl.core import UserError, unit

r = np.random.default_rng(0)
x = np.repeat(r.standard_normal((60, 32)), 5, 0) + 0.3 * r.standard_normal((300, 32))
x = unit(x.astype("float32"))

def people(how=0):
    search, labeller = [("exact", "dbscan"), ("approximate", "hdbscan")][how]
    try:
        return int(pseudo_labels(x, 6, 2, 0.5, 2, search, labeller).max() > 50)
    except UserError as e:
        assert "spawn" in str(e) and len(str(e).splitlines()) == 1
        return "refused"

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, row):
        return people(row)

def children():
    with multiprocessing.get_context("fork").Pool(2) as pool:
        yield from pool.map_async(people, [0, 1]).get(60)
    loader = torch.utils.data.DataLoader(Rows(), num_workers=2, collate_fn=list, timeout=60)
    yield from (answer for batch in loader for answer in batch)

def parent_used(what):
    print(what, *children(), flush=True)

if __name__ == "__main__":
    parent_used("nothing")
    a = torch.randn(2048, 512)
    (a @ a.T).sum()
    parent_used("torch")
    import faiss
    faiss.knn(x, x, 5)
    parent_used("faiss")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    people()
    print("threads", torch.get_num_threads(), flush=True)
    torch.set_num_threads(threads)
    parent_used("clustering")
    with ThreadPoolExecutor(4) as pool:
        print("together", *pool.map(people, [0, 1] * 4))
"""


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_threads_and_forks(layer, promise, monkeypatch):
    "GNU OpenMP's threads are lost in a fork. numba's own are started again there."
    script = re.sub(r"^if __name__.*$", "if True:", FORK, flags=re.M)
    folder = os.environ.get("NUMBA_CACHE_DIR", "")
    after = "refused" if layer == "omp" else "1"
    want = [["nothing", *"1111"], ["torch", *"1111"], ["faiss", *"1111"], ["threads", "1"]]
    want += [["clustering", *[after] * 4], ["together", *"11111111"]]
    assert said(run(script, folder, NUMBA_THREADING_LAYER=layer)) == list(itertools.chain(*want))
    promise(FORKS, cases=4 * 4 + 8)


def test_pair_dots_in_a_fork(monkeypatch):
    "Every function that runs parallel code says it, not the clustering alone."
    from cpcl.cluster.machine_code import _Process
    from cpcl.core import UserError

    monkeypatch.setattr(_Process, "lost", "omp")
    x = people()
    near = np.zeros((300, 1), np.int64)
    for call in (
        lambda: pair_dots(x, [0], [1]),
        lambda: knn(x, 3),
        lambda: jaccard.jaccard_graph(near + np.arange(300)[:, None], x),
    ):
        with pytest.raises(UserError, match="spawn"):
            call()
