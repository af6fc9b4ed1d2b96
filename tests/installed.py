"""What is published, used by somebody new.

`python tests/installed.py` builds the source archive and its wheel, installs the wheel into an
environment outside the checkout, and trains, indexes and searches there with an empty home.

By default the environment shares the packages of the Python that runs this and takes no download.
`--python PYTHON` (several) makes one with that Python and installs all that the wheel asks for; `--cpu`
beside it installs what `requirements-cpu.txt` lists instead, with a torch of your own (`--torch`).
`--quick` trains `clip`, which compiles nothing. The last line of each is a record: versions, megabytes,
and per step seconds by the clock and of a processor.
"""

import argparse, json, os, shutil, subprocess, sys, sysconfig, tarfile, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOP = ("cpcl", "data/tiny-clip")  # beside the files of the top level, what the archive is made of
PIP = ("-m", "pip", "--disable-pip-version-check", "-q")
SENTENCE = "a woman in a red coat with a black backpack"


def run(*command, **options):
    "Run a command and return what it prints. A failure shows everything that it printed."
    options.setdefault("env", {k: v for k, v in os.environ.items() if k != "PYTHONPATH"})  # a checkout's
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    if done.returncode:
        raise AssertionError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def source_archive(folder):
    "The source archive, made of a copy of the checkout."
    source = folder / "source"
    for name in TOP:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, source)
    run(sys.executable, "setup.py", "-q", "sdist", cwd=source)
    (archive,) = (source / "dist").iterdir()
    return archive


def wheel_of(archive, folder):
    "The wheel, made of the source archive alone, with neither a checkout nor a network."
    with tarfile.open(archive) as held:
        names = {name.partition("/")[2] for name in held.getnames()}
    wanted = {"settings.ini", "setup.py", "pyproject.toml", "requirements-cpu.txt", "LICENSE", "README.md"}
    assert wanted | {"data/tiny-clip/model.safetensors"} <= names, names
    run(
        sys.executable,
        *PIP,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        folder,
        archive,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def sharing_environment(folder, wheel):
    "An environment with the wheel alone, that finds every other package where this Python has it."
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "shared.pth").write_text(
        sysconfig.get_path("purelib") + "\n"
    )  # whose own .pth files are not read
    run(sys.executable, *PIP, "--python", python, "install", "--no-deps", "--no-index", wheel)
    return python


def complete_environment(folder, wheel, python, cpu=False, torch=()):
    "An environment with the wheel and all that it, or the lean list, asks for (by uv, if there is one)."
    uv, python = shutil.which("uv"), shutil.which(python)
    if uv:
        run(uv, "venv", "-q", "--python", python, folder)
        pip = (uv, "pip", "install", "-q", "--python", folder / "bin" / "python")
    else:
        run(python, "-m", "venv", folder)
        pip = (folder / "bin" / "python", *PIP, "install")
    if torch:
        run(*pip, *torch)
    if cpu:
        run(*pip, "-r", ROOT / "requirements-cpu.txt")
        run(*pip, "--no-deps", wheel)
    else:
        run(*pip, f"{wheel}[app]")
    return folder / "bin" / "python"


def clean(folder):
    "The environment variables of a new user: an empty home, and nothing of this checkout."
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "TMPDIR", "OMP_WAIT_POLICY")}
    (folder / "home").mkdir(parents=True)
    return kept | {"HOME": str(folder / "home"), "COLUMNS": "80"}


WHERE = """
import json, sys, cpcl.core, torch
from importlib.metadata import distributions
from pathlib import Path
assert cpcl.core.repo_root() is None, cpcl.core.repo_root()
names = sorted({f"{d.name} {d.version}" for d in distributions()})
versions = dict(torch=torch.__version__, python=sys.version.split()[0])
print(json.dumps(dict(file=cpcl.__file__, packages=names) | versions))
"""


def used_as_new(python, folder, preset="cpcl"):
    "The first commands of a new user: the sample set is drawn, an epoch trained, an index built and asked."
    env = clean(folder)
    here, cpcl, times = folder / "home", python.parent / "cpcl", {}

    def step(name, *command):
        start, before = time.perf_counter(), os.times()
        said = run(*command, cwd=here, env=env)
        used = os.times().children_user - before.children_user
        times[name] = [round(time.perf_counter() - start, 1), round(used, 1)]
        return said

    about = json.loads(step("import", python, "-c", WHERE))
    assert Path(about["file"]).is_relative_to(python.parent.parent), about["file"]
    assert "train" in step("help", cpcl, "--help")
    said = step("train", cpcl, "train", "--preset", preset, "--epochs", "1", "--out", "run")
    assert (here / "run" / "last.safetensors").is_file(), said
    (images,) = here.glob(".cache/cpcl/sample-*/mini/imgs")
    step("index", cpcl, "index", images / "cam_1", "--run", "run", "--out", "index")
    found = step("search", cpcl, "search", "index", SENTENCE, "-k", "3")
    assert found.count(".jpg") == 3, found
    return about | dict(seconds=times)


def megabytes(folder):
    "The size of an environment."
    return round(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink()) / 1e6)


def main():
    "Build, install, use; one record per environment."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the first of the demo's two trainings, `clip`")
    parser.add_argument("--python", action="append", help="make a complete environment with this Python")
    parser.add_argument("--cpu", action="store_true", help="of requirements-cpu.txt")
    parser.add_argument("--torch", nargs="*", default=(), help="what pip installs before everything else")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        wheel = wheel_of(source_archive(folder), folder)
        for i, given in enumerate(asked.python or [None]):
            place = folder / f"env{i}"
            if given:
                python = complete_environment(place, wheel, given, asked.cpu, asked.torch)
            else:
                python = sharing_environment(place, wheel)
            preset = "clip" if asked.quick else "cpcl"
            about = used_as_new(python, folder / f"user{i}", preset) | dict(
                wheel_mb=round(wheel.stat().st_size / 1e6, 1)
            )
            if given:
                about["mb"] = megabytes(place)
            else:
                del about["packages"]
            shutil.rmtree(place)
            print(json.dumps(about), flush=True)


if __name__ == "__main__":
    main()
