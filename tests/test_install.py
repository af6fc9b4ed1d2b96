"What is published installs and works: source archive, wheel, lean list, container."

import ast, json, os, re, shlex, shutil, sys
from configparser import ConfigParser
from fnmatch import fnmatch
from pathlib import Path

import pytest
from installed import PIP, clean, complete_environment, run, sharing_environment
from installed import source_archive, used_as_new, wheel_of
from packaging.requirements import Requirement
from readme import ROOT

CONFIG = ConfigParser(delimiters=["="])
CONFIG.read(ROOT / "settings.ini", encoding="utf8")
PLATFORMS = {  # uv's name -> what markers see
    "x86_64-manylinux_2_28": ("Linux", "x86_64"),
    "aarch64-manylinux_2_28": ("Linux", "aarch64"),
    "aarch64-apple-darwin": ("Darwin", "arm64"),
    "x86_64-pc-windows-msvc": ("Windows", "AMD64"),
}


def needs(*parts):
    "Requirements of settings.ini."
    return [line for part in parts for line in CONFIG["DEFAULT"][f"{part}requirements"].splitlines() if line]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, made of the source archive."
    folder = tmp_path_factory.mktemp("wheel")
    return wheel_of(source_archive(folder), folder)


@pytest.mark.slow
def test_a_new_user(wheel, tmp_path, promise):
    "Outside the checkout, with an empty home: the sample set is drawn, an epoch trained, an index asked."
    promise("the source archive and its wheel install")
    about = used_as_new(sharing_environment(tmp_path / "env", wheel), tmp_path / "user")
    assert set(about["seconds"]) == {"import", "help", "train", "index", "search"}


@pytest.mark.slow
def test_the_demo_of_a_wheel(wheel, tmp_path, promise):
    promise("`cpcl demo` of the installed wheel prints its table")
    python = sharing_environment(tmp_path / "env", wheel)
    env = clean(tmp_path / "user")
    said = run(python.parent / "cpcl", "demo", "--epochs", "1", cwd=tmp_path, env=env)
    assert "tiny CLIP as it is" in said and "ranked lists: runs/demo/ranked_lists.png" in said
    assert (tmp_path / "runs" / "demo" / "ranked_lists.png").stat().st_size > 10_000


PYTHONS = os.environ.get("CPCL_PYTHONS", "").split()


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS or [None])
def test_every_python(python, wheel, tmp_path, promise):
    "`make pythons`: a complete environment per Python, with all that the wheel asks for (gigabytes each)."
    if python is None:
        pytest.skip("CPCL_PYTHONS names no Python; `make pythons` names those of this machine")
    promise("a fresh environment with all requirements works", python=python)
    try:
        about = used_as_new(complete_environment(tmp_path / "env", wheel, python), tmp_path / "user")
    finally:
        shutil.rmtree(tmp_path / "env", ignore_errors=True)
    print(json.dumps(about))


# --- requirements


@pytest.mark.parametrize("system, machine", [*PLATFORMS.values(), ("Darwin", "x86_64")])
def test_one_faiss_everywhere(system, machine):
    "faiss-gpu on Linux x86-64, faiss-cpu elsewhere: they own the same folder and must not meet."
    asked = [Requirement(line) for line in needs("platform_")]
    here = [
        r.name for r in asked if r.marker.evaluate(dict(platform_system=system, platform_machine=machine))
    ]
    assert here == ["faiss-gpu" if (system, machine) == ("Linux", "x86_64") else "faiss-cpu"]


def test_the_lean_list():
    "requirements-cpu.txt is settings.ini with faiss-cpu, and the extra `app` without its widget."
    lines = (ROOT / "requirements-cpu.txt").read_text().splitlines()
    (faiss,) = {line.partition(";")[0] for line in needs("platform_") if line.startswith("faiss-cpu")}
    app = [line for line in needs("app_") if not line.startswith("ipywidgets")]
    assert [line for line in lines if line[0] != "#"] == [*needs(""), faiss, *app]


WITHOUT_FAISS = """
import sys
sys.modules["faiss"] = None  # as if it were not installed
from pathlib import Path
import numpy as np, pandas as pd
from cpcl.cluster.knn import knn, slow_knn
from cpcl.core import load_faiss, unit
from cpcl.search.manifest import Manifest
from cpcl.search.store import LocalStore, read_store
assert load_faiss() is None
x = unit(np.random.default_rng(0).normal(size=(300, 16)).astype("float32"))
x[200:] = x[:100]
for search in ("exact", "approximate"):
    assert (knn(x, 8, search)[0] == slow_knn(x, 8)[0]).all()
rows = pd.DataFrame(dict(path=[f"{i}.jpg" for i in range(300)], size=1, mtime_ns=2, camera=["1", "2"] * 150))
store = LocalStore(exact_rows=100)
store.add(rows, x)
assert store.finish(rows, None) and store.kind == "Flat"
said = dict(folder="/c", run="/r", weights="1", model="tiny", width=16, unreadable=[])
about = Manifest(**said, columns={"camera": None})
again = read_store("index", store.write("index", about))
(found,) = again.nearest(x[3:4], 5, {"camera": ["2"]})
print(*found.path)
"""


def test_without_faiss(tmp_path, promise):
    "Neighbours, an index, and a search that is filtered, with torch's top-k alone."
    promise("without faiss torch's top-k does the work")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    found = run(sys.executable, "-c", WITHOUT_FAISS, cwd=tmp_path, env=env).split()
    assert set(found[:2]) == {"3.jpg", "203.jpg"} and len(found) == 5
    (file,) = (tmp_path / "index").glob("*.faiss")
    code = f"import torch, faiss; print(faiss.read_index({str(file)!r}).ntotal)"
    assert run(sys.executable, "-c", code).strip() == "300"  # and faiss reads the file


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", ["3.10", "3.13"])
def test_every_platform_resolves(platform, python, tmp_path):
    "uv finds a set of releases that fit together, extras included, and none that only another system has."
    uv = shutil.which("uv") or shutil.which("uv", path=Path(sys.executable).parent)
    if uv is None:
        pytest.skip("uv is not installed")
    extras = ("app_", "export_", "heic_", "milvus_", "peft_", "serve_", "crop_", "data_", "trackers_")
    asked = needs("", "platform_", *(e for e in extras if f"{e}requirements" in CONFIG["DEFAULT"]))
    (tmp_path / "asked.txt").write_text("\n".join(asked))
    where = ("--python-platform", platform, "--python-version", python)
    quiet = ("--no-header", "--no-annotate", "--only-binary", ":all:", "-q")
    found = run(uv, "pip", "compile", *where, *quiet, tmp_path / "asked.txt").split()
    names = {line.partition("==")[0] for line in found}
    assert {"torch", "open-clip-torch", "numba", "gradio"} <= names
    assert names & {"faiss-gpu", "faiss-cpu"} == {"faiss-gpu" if "x86_64-many" in platform else "faiss-cpu"}
    if "manylinux" not in platform:
        assert not [n for n in names if n.startswith("nvidia-")]


# --- what the installed package says and imports

OF_OTHERS = "always branch dirty porcelain show-toplevel untracked-files"  # git
OF_OTHERS += " shm-size again list data-urlencode"  # docker; python -m cpcl.lab.plan; curl


def strings(path):
    "The string literals of a module."
    return [
        n.value for n in ast.walk(ast.parse(path.read_text(encoding="utf8"))) if isinstance(n, ast.Constant)
    ]


def test_messages_name_options_that_exist():
    "Every `--option` in a text of the package is one of some command of cpcl."
    from dataclasses import fields

    from cpcl.cli.program import COMMANDS

    known = {f.name.replace("_", "-") for command in COMMANDS.values() for f in fields(command)}
    known |= {"help", "debug", "version", "verbose", "tyro-print-completion", *OF_OTHERS.split()}
    for path in (ROOT / "cpcl" / "cli").glob("*.py"):  # fields of another name
        known |= set(re.findall(r'tyro\.conf\.arg\(name="([\w-]+)"', path.read_text(encoding="utf8")))
    for path in (ROOT / "cpcl").rglob("*.py"):
        for text in filter(lambda s: isinstance(s, str), strings(path)):
            for option in re.findall(r"(?<![\w(-])--([a-z][\w-]*)(?![\w-]|\s*:)", text):  # no CSS variable
                assert option in known, f"{path.name}: --{option}"


def test_no_module_needs_what_only_tests_need():
    "Packages of the extra `dev` are not imported by the package (nbformat and nbclient run notebooks)."
    for path in (ROOT / "cpcl").rglob("*.py"):
        text = path.read_text(encoding="utf8")
        found = re.findall(r"^\s*(?:from|import) (fastcore|nbdev|pytest|hypothesis|IPython)\b", text, re.M)
        assert not found, f"{path.name} imports {found[0]}"


def test_requirements_are_one_a_line():
    for name, text in CONFIG["DEFAULT"].items():
        if name.endswith("requirements"):
            for line in filter(None, text.splitlines()):
                Requirement(line)


# --- the container


def steps():
    "The instructions of the Dockerfile: (name, rest)."
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    return [line.split(maxsplit=1) for line in text.splitlines() if line and line[0] != "#"]


def copied():
    "What the Dockerfile copies: path in the checkout -> path in the image."
    files = {}
    for name, rest in steps():
        if name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                files[source] = target + source if target.endswith("/") else target
    return files


def test_the_container_copies_what_there_is():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"  # everything, but for:
    let_in = {line[1:] for line in ignored if line[0] == "!"}
    assert set(copied()) == let_in
    tracked = run("git", "ls-files", cwd=ROOT).split() if (ROOT / ".git").exists() else None
    for source in copied():
        assert (ROOT / source).exists(), source
        assert tracked is None or any(fnmatch(t, f"{source}*") for t in tracked), source


def test_the_container_runs_what_we_test():
    "Its commands are those of the tutorial, and the examples above it are commands of cpcl."
    from cpcl.cli import parse

    text = (ROOT / "Dockerfile").read_text()
    taught = (ROOT / "nbs" / "tutorials" / "install.ipynb").read_text()
    for command in re.findall(r"pip install .*?(?= &&|;|\s*\\?\n)", text):
        known = command.replace("/src/", "").replace("/src[app]", "cpcl[app]").replace("/src", "cpcl")
        assert known in taught.replace('"', "'"), command
    for command in re.findall(r"^#.* (?:cpcl|cpcl:cuda) (\w+ .*)$", text, re.M):
        if not command.startswith(("--", ".")):
            parse(shlex.split(command))
    assert (["ENTRYPOINT", '["cpcl"]']) in steps()


@pytest.mark.slow
def test_the_container_builds_of_its_files(tmp_path):
    "A wheel is made of what the Dockerfile copies, and of nothing else."
    for source, target in copied().items():
        target = tmp_path / target.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, target)
    where = ("--no-deps", "--no-build-isolation", "--no-index", "--target", tmp_path / "site")
    run(sys.executable, *PIP, "install", *where, tmp_path / "src")
    assert (tmp_path / "site" / "cpcl" / "tiny_clip" / "model.safetensors").is_file()
