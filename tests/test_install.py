"What is published installs: the source archive and the wheel made of it, without a checkout or a network."

import os, shutil, subprocess, sys, tarfile

import pytest
from readme import ROOT


def run(*command, **options):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_source_archive_installs(tmp_path, promise):
    "A wheel is made of the archive alone, and what it installs imports, with its files that are no Python."
    promise("the source archive and its wheel install")
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT / "cpcl", source / "cpcl", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, source)
    run("setup.py", "-q", "sdist", cwd=source)
    (archive,) = (source / "dist").iterdir()
    with tarfile.open(archive) as held:
        names = {name.partition("/")[2] for name in held.getnames()}
    assert {"settings.ini", "setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    pip = ("-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path, archive)
    (wheel,) = tmp_path.glob("*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--target", site, wheel)
    code = (
        "import cpcl, cpcl.core, cpcl.synth.style as s\n"
        "from cpcl.cli import parse\n"
        "parse(['train', '--epochs', '3'])\n"
        "assert cpcl.core.repo_root() is None and s.read_style('town')\n"
        "print(cpcl.__file__)"
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    found = run("-c", code, cwd=tmp_path, env=env | {"PYTHONPATH": str(site)})
    assert found.strip() == str(site / "cpcl" / "__init__.py")
