"The drawing program: its sets are frozen, and its style files travel with the package."

import json, shutil, subprocess, sys, zipfile

import pytest

from cpcl.synth.dataset import SynthWorld, checksum
from cpcl.synth.grounds import CHECKSUMS, GROUNDS
from readme import ROOT

STUDIO = "b342034ee07ed0609f6bfedd8d09728caa687bf15b5e275a9e1986b4c12597bf"


def test_the_sample_set_is_what_the_street_draws():
    "`data/mini` can be drawn again, to the pixel (synth-1k of the town: tests/test_data.py)."
    found = json.loads((ROOT / "data" / "mini" / "synth.json").read_text())
    assert found["checksum"] == checksum(SynthWorld(450, 20))


def test_the_studio_is_frozen():
    "The tiny CLIP's training set begins with these people, captions and pixels."
    assert checksum(SynthWorld(100, 7_000_000, "studio")) == STUDIO


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The names of the files that `pip install .` installs."
    pytest.importorskip("setuptools")
    copy = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "cpcl", copy / "cpcl", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "data" / "tiny-clip", copy / "data" / "tiny-clip")
    build = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", "dist"]
    subprocess.run(build, cwd=copy, check=True, capture_output=True)
    with zipfile.ZipFile(next((copy / "dist").glob("*.whl"))) as z:
        return set(z.namelist())


def test_the_wheel_holds_every_file_of_the_package(wheel):
    ours = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "cpcl").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert not ours - wheel
    assert "cpcl/synth/styles/street.json" in wheel


@pytest.mark.parametrize("name", GROUNDS)
def test_the_grounds_are_frozen(name):
    "Records on a ground depend on its captions, attributes and pixels."
    assert checksum(GROUNDS[name].world()) == CHECKSUMS[name]
