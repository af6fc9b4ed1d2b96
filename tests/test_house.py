"What keeps the house in order: notebooks, package and README say the same, and every module imports."
import ast, importlib, json, os, pkgutil, shutil, subprocess, sys
from pathlib import Path

import pytest

import cpcl
from readme import ROOT, readme

MODULES = sorted(m.name for m in pkgutil.iter_modules(cpcl.__path__) if not m.name.startswith("_"))
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def run(*command, cwd):
    done = subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], cwd=cwd, capture_output=True, text=True,
                          env={k: v for k, v in os.environ.items() if k != "IN_TEST"})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    "A copy of the project, exported and cleaned anew."
    copy = tmp_path_factory.mktemp("house")
    for name in ("nbs", "cpcl"): shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "setup.py", "pyproject.toml"): shutil.copy(ROOT / name, copy)
    for old in (copy / "cpcl").rglob("*.py"):
        if old.name not in ("__init__.py", "_modidx.py"): old.unlink()
    run("nbdev_export", cwd=copy)
    run("nbdev_clean", cwd=copy)
    return copy


def test_export_changes_nothing(fresh):
    names = lambda root: sorted(p.name for p in (root / "cpcl").glob("*.py"))
    assert names(fresh) == names(ROOT), "a module without its notebook, or a notebook not exported: run `make export`"
    for name in names(ROOT):
        assert (fresh / "cpcl" / name).read_text() == (ROOT / "cpcl" / name).read_text(), f"cpcl/{name} is not what its notebook exports: run `make export`"


def test_notebooks_are_clean(fresh):
    for p in NOTEBOOKS:
        assert json.loads((fresh / p.relative_to(ROOT)).read_text()) == json.loads(p.read_text()), f"{p.name} is not clean: run `make export`"


def test_notebooks_ran_without_error():
    for p in NOTEBOOKS:
        for cell in json.loads(p.read_text())["cells"]:
            assert not any(o["output_type"] == "error" for o in cell.get("outputs", [])), f"{p.name} holds an error output"


def test_readme_is_index():
    assert (ROOT / "README.md").read_text(encoding="utf8") == readme(), "README.md is not nbs/index.ipynb: run `make export`"


@pytest.mark.parametrize("name", MODULES)
def test_module_imports(name):
    module = importlib.import_module(f"cpcl.{name}")
    for public in getattr(module, "__all__", []): assert hasattr(module, public)


def test_nothing_heavy_at_import():
    code = "import sys, cpcl.core, cpcl.config; assert 'faiss' not in sys.modules and 'open_clip' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_faiss_only():
    "faiss-cpu and faiss-gpu own the same folder and overwrite each other."
    from importlib.metadata import distributions
    found = {d.metadata["Name"].lower() for d in distributions()} & {"faiss-cpu", "faiss-gpu"}
    assert len(found) == 1, f"installed together: {found}"


def test_modules_import_downwards():
    "A notebook imports lower numbers only."
    number = {}
    for p in NOTEBOOKS:
        for cell in json.loads(p.read_text())["cells"]:
            for line in "".join(cell["source"]).splitlines():
                if line.startswith("#| default_exp"): number[line.split()[-1]] = p.name
    for name, notebook in number.items():
        for node in ast.walk(ast.parse((ROOT / "cpcl" / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                assert number[node.module] < notebook, f"{notebook} imports cpcl.{node.module}, which comes later"
