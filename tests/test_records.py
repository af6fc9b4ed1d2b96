"Records answer for the code: a changed loss makes them stale, another way of writing the same code does not."

import ast, importlib, inspect, json, os, shutil, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import cpcl
from cpcl.encoder import EncoderConfig
from cpcl.lab.carry import stamp
from cpcl.lab.code import changed_modules, read_modules, run_code
from cpcl.lab.grid import run_missing
from cpcl.lab.records import Spec, answers, read_records
from cpcl.lab.tables import against, verdict
from cpcl.synth.dataset import write_synth
from cpcl.train import make_config, train_run
from cpcl.train.config import config_from
from readme import ROOT

RECORDS = sorted((ROOT / "nbs" / "ablations" / "records").glob("*.json"))
NOTEBOOKS = sorted(p for d in ("ablations", "benchmarks") for p in (ROOT / "nbs" / d).glob("*.ipynb"))
PRESETS = ("clip", "cluster-contrast", "cpcl", "supervised")
TODAY = read_modules()


@pytest.fixture
def package(tmp_path):
    "A copy of the package that a test may edit."
    ignored = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(cpcl.__path__[0], tmp_path / "cpcl", ignore=ignored))


def edit(path, change):
    "Apply a function to the syntax tree of a module."
    tree = ast.parse(path.read_text(encoding="utf8"))
    path.write_text(ast.unparse(ast.fix_missing_locations(change(tree))), encoding="utf8")


def changes(package):
    "preset -> the modules in which a copy of the package differs for a run of it."
    cfgs, edited = {preset: make_config(preset) for preset in PRESETS}, read_modules(package)
    codes = {preset: [run_code(cfg, modules=m) for m in (TODAY, edited)] for preset, cfg in cfgs.items()}
    return {preset: changed_modules(*both) for preset, both in codes.items()}


class Scaled(ast.NodeTransformer):
    "What a function returns, times 0.01."

    def __init__(self, name):
        self.name = name

    def visit_FunctionDef(self, node):
        return self.generic_visit(node) if node.name == self.name else node

    def visit_Return(self, node):
        node.value = ast.BinOp(node.value, ast.Mult(), ast.Constant(0.01))
        return node


def test_a_scaled_loss_is_another_loss(package):
    edit(package / "losses.py", Scaled("itc").visit)
    assert changes(package) == dict.fromkeys(PRESETS, ("losses",))


class Rewritten(ast.NodeTransformer):
    "Other docstrings, no annotations of arguments and results."

    def visit_FunctionDef(self, node):
        node.returns = None
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        if ast.get_docstring(node):
            node.body[0].value.value = "Other words."
        return self.generic_visit(node)


def test_the_same_code_written_otherwise_is_the_same(package):
    "No comment and none of the old lines is left; nothing is stale."
    for path in package.rglob("*.py"):
        edit(path, Rewritten().visit)
    assert changes(package) == dict.fromkeys(PRESETS, ())


def test_only_what_a_run_uses_counts(package):
    for module in ("oplm", "cluster/labels", "viz/curves", "lab/tables"):
        path = package / f"{module}.py"
        path.write_text(path.read_text(encoding="utf8") + "\nANOTHER = 1\n", encoding="utf8")
    found = changes(package)
    assert found["clip"] == found["supervised"] == ()
    assert found["cluster-contrast"] == ("cluster.labels",)
    assert found["cpcl"] == ("cluster.labels", "oplm")


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: file.stem)
def test_committed_records(tmp_path, package, file):
    "A record has its code or the commit it is carried over from, answers for its settings, can be stamped."
    for record in read_records(file):
        assert record.code or record.carried["commit"]
        assert answers(record, config_from(record.config), record.data, record.spec.hooks)
        assert len(record.queries["first"]) == record.result["last"]["queries"]
    copy = Path(shutil.copy(file, tmp_path))
    stamp(copy)
    edit(package / "losses.py", Scaled("itc").visit)
    modules = read_modules(package)
    for record in read_records(copy):
        code = run_code(config_from(record.config), *record.spec.hooks, modules)
        assert "losses" in changed_modules(record.code, code)


@pytest.mark.slow
def test_stamping_keeps_every_number(tmp_path):
    def numbers(records):
        return [(r.data, r.history, r.queries, r.result, r.seconds, r.environment) for r in records]

    for file in RECORDS:
        copy = Path(shutil.copy(file, tmp_path))
        before = numbers(read_records(copy))
        stamp(copy)
        assert json.dumps(numbers(read_records(copy))) == json.dumps(before)


@pytest.mark.slow
def test_one_job_gives_the_numbers_of_two(tmp_path):
    "The default loss by name reaches the worker processes and gives the same, as another run."
    root = write_synth(tmp_path / "s", people=30, seed=3, splits=(16, 4, 10))
    quick = {"optim.epochs": 1, "labels.image.k1": 6, "labels.caption.k1": 6}
    takes_a_loss = "loss" in inspect.signature(train_run).parameters
    hooks = dict(label="named", loss="cpcl.hcm:hcm_loss") if takes_a_loss else {}
    specs = [Spec("clip", 0, quick), Spec("cpcl", 0, quick), Spec("cpcl", 0, quick, **hooks)]
    small = dict(root=root, runs=tmp_path / "runs", log=lambda line, **kwargs: None)
    small["encoder"] = EncoderConfig(pretrained="", height=48, width=24)
    with mock.patch.dict(os.environ, {"CPCL_RUN": "1"}):
        _, default, named = run_missing(specs, tmp_path / "two.json", jobs=2, **small)
        (alone,) = run_missing(specs[2:], tmp_path / "one.json", jobs=1, **small)
    assert default.history == named.history == alone.history
    assert default.queries == named.queries == alone.queries
    assert ("cpcl.hcm:hcm_loss" in named.code) == takes_a_loss


PLAN = """
import sys
from pathlib import Path
from cpcl.encoder import EncoderConfig
from cpcl.lab.grids import Grid
from cpcl.lab.plan import work_off

class Small(Grid):
    records_file = Path(sys.argv[1]) / "records.json"
    def root(self):
        return Path(sys.argv[1]) / "s"

if __name__ == "__main__":
    quick = {"optim.epochs": 3, "labels.image.k1": 6, "labels.caption.k1": 6}
    grid = Small({"clip": ("clip", quick), "cpcl": ("cpcl", quick)}, schedule="tiny", seeds=(0, 1))
    blank = EncoderConfig(pretrained="", height=48, width=24)
    sys.exit(work_off([grid], at_once=2, encoder=blank, runs=Path(sys.argv[1]) / "runs"))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").is_file(), reason="lists processes as Linux does")
def test_a_killed_plan_goes_on(tmp_path):
    "Killed after its first record, the plan leaves no process behind, and what is missing is made later."
    write_synth(tmp_path / "s", people=30, seed=3, splits=(16, 4, 10))
    (tmp_path / "small_plan.py").write_text(PLAN)
    command = [sys.executable, str(tmp_path / "small_plan.py"), str(tmp_path)]
    records = tmp_path / "records.json"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as plan:
        workers = set()
        while not records.is_file() and plan.poll() is None:
            time.sleep(0.2)
            workers |= set(Path(f"/proc/{plan.pid}/task/{plan.pid}/children").read_text().split())
        plan.send_signal(signal.SIGKILL)
    assert 1 <= len(read_records(records)) < 4 and len(workers) >= 2
    until = time.time() + 60
    while any(Path(f"/proc/{pid}").exists() and _alive(pid) for pid in workers) and time.time() < until:
        time.sleep(0.2)
    assert not any(Path(f"/proc/{pid}").exists() and _alive(pid) for pid in workers)
    made = records.read_text().splitlines()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"{4 - len(made)} of 4 runs left")
    assert records.read_text().splitlines()[: len(made)] == made and len(read_records(records)) == 4


def _alive(pid):
    "Whether a process runs, and is not only remembered by one that did not ask for its end."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_notebooks_import_what_there_is(file):
    "Ablations and benchmarks, which no test runs, import names of the package that exist."
    cells = [c for c in json.loads(file.read_text(encoding="utf8"))["cells"] if c["cell_type"] == "code"]
    sources = ["".join(line for line in c["source"] if not line.startswith("%")) for c in cells]
    for node in ast.walk(ast.parse("\n".join(sources))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "cpcl":
            module = importlib.import_module(node.module)
            missing = [a.name for a in node.names if not hasattr(module, a.name)]
            assert not missing, f"{file.name} imports {', '.join(missing)} from {node.module}"


def test_one_seed_is_never_called_better_or_worse():
    "In the committed records a row with one seed has a difference, no interval, and no verdict."
    records = read_records(ROOT / "nbs" / "ablations" / "records" / "synth-1k.json")
    one = [replace(r, spec=replace(r.spec, label=f"row {i}")) for i, r in enumerate(records)]
    base = [replace(r, spec=replace(r.spec, label="base")) for r in records[:3]]
    who = np.arange(len(records[0].queries["first"])) // 8
    table = against(base + one, "base", who)
    assert table.seeds.eq(1).all() and all(
        cell.endswith(", one seed") for cell in table[["R1", "mAP"]].values.flat
    )
    assert {verdict(base + one, "base", f"row {i}", who) for i in range(len(one))} == {"one seed"}
