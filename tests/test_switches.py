"Parts of follow-ups, switched on: a run resumes with the same bits, and every part has an effect."

import pytest, torch

from cpcl.core import UserError
from cpcl.data import load_person, load_split
from cpcl.encoder import EncoderConfig
from cpcl.eval.label_quality import quality_of
from cpcl.synth.dataset import write_synth
from cpcl.train import make_config
from cpcl.train.loop import fit

BLANK = EncoderConfig(pretrained="", height=48, width=24)
QUICK = {"optim.epochs": 2, "optim.batch_size": 16, "labels.image.k1": 6, "labels.caption.k1": 6}
PARTS = {
    "teacher": {"memory.teacher": 0.9, "hcm.soft": 0.3},
    "teacher kept": {"memory.teacher": 0.9, "memory.keep": "teacher"},
    "bank": {"hcm.near": 0.5, "memory.least": 0.2},
    "gate": {"hcm.gate": 0.3},
    "second view": {"augment.second": 0.5},
    "outliers leave": {"labels.outliers": "leave"},
    "confidence": {"labels.confidence": True},
    "hard": {"memory.hard": True},
    "momentum that changes": {"memory.mu_end": 0.9},
    "consensus": {"labels.image.consensus": 3, "labels.caption.consensus": 3},
    "cameras": {"labels.by_camera": True},
    "agreement": {"labels.oplm.least_agreement": 1.0},
}
BOUNDS = ("true-images", "true-captions", "true-outliers", "true-matches")
SHARED = {"labels.source": "image", "labels.fuse": 0.5, "memory.shared": True}
ALONE = PARTS | {"own prototypes": {"labels.outliers": "own"}}  # of which each is switched on alone


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return load_split(
        write_synth(tmp_path_factory.mktemp("set"), people=14, seed=3, splits=(12, 1, 1), with_camera=True)
    )


class Stopped(Exception):
    "A run that ends after its first epoch."


def trained(split, run, changes, stop=False, resume=False, **kwargs):
    "The bytes of the last encoder of a run, and its history."
    cfg = make_config("cpcl", images=len(split.images), encoder=BLANK, changes=QUICK | changes)

    def log(line):
        if stop and line.startswith("epoch"):
            raise Stopped

    history = fit(cfg, split, run, log=log, resume=resume, trackers="none", **kwargs)
    return (run / "last.safetensors").read_bytes(), history


@pytest.fixture(scope="module")
def plain(split, tmp_path_factory):
    return trained(split, tmp_path_factory.mktemp("plain") / "run", {})


@pytest.mark.parametrize(
    "changes",
    [{k: v for part in PARTS.values() for k, v in part.items()}, SHARED, SHARED | {"labels.outliers": "own"}],
    ids=["all", "shared", "own"],
)
def test_a_run_with_parts_resumes_with_the_same_bits(split, tmp_path, changes, promise):
    promise("parts of follow-ups: a resumed run is the same, bit for bit")
    whole, history = trained(split, tmp_path / "whole", changes)
    with pytest.raises(Stopped):
        trained(split, tmp_path / "halves", changes, stop=True)
    resumed, again = trained(split, tmp_path / "halves", changes, resume=True)
    assert resumed == whole
    assert [row.steps.terms for row in again] == [row.steps.terms for row in history]
    assert all(torch.isfinite(torch.tensor(row.steps.terms["loss"])) for row in history)


@pytest.mark.slow
@pytest.mark.parametrize("part", ALONE)
def test_every_part_does_something(split, plain, tmp_path, part):
    changed, history = trained(split, tmp_path / "run", ALONE[part])
    assert changed != plain[0]
    assert all(torch.isfinite(torch.tensor(row.steps.terms["loss"])) for row in history)


def test_parts_go_through_the_towers_in_chunks(split, tmp_path):
    both = PARTS["second view"] | PARTS["teacher"] | PARTS["bank"]
    (_, whole), (_, chunked) = (
        trained(split, tmp_path / str(chunk), both | {"optim.chunk": chunk, "optim.epochs": 1})
        for chunk in (0, 7)
    )
    for name, value in whole[0].steps.terms.items():
        assert chunked[0].steps.terms[name] == pytest.approx(value, rel=2e-3), name


@pytest.mark.slow
@pytest.mark.parametrize("source", BOUNDS)
def test_every_bound_replaces_its_part(split, plain, tmp_path, source):
    person = load_person(split)
    with pytest.raises(UserError, match="needs people"):
        trained(split, tmp_path / "nobody", {"labels.source": source})
    given = dict(truth=lambda: person, quality=quality_of(person, split.image_of))
    changed, history = trained(split, tmp_path / "run", {"labels.source": source}, **given)
    assert changed != plain[0]
    perfect = {"true-images": "img", "true-captions": "txt"}.get(source)
    if perfect:
        assert [history[1].quality[f"{name}_{perfect}"] for name in ("ari", "precision", "recall")] == [
            1.0
        ] * 3
    assert history[1].quality["right_txt"] in (None, 1.0) or source != "true-outliers"


def test_cameras_that_nobody_knows_are_asked_for_in_one_line(split, tmp_path):
    rows = ["image,caption", *(f"{name},someone" for name in split.images[:4])]
    (split.root / "some.csv").write_text("\n".join(rows))
    some = load_split(split.root / "some.csv")
    with pytest.raises(UserError, match="needs the camera of every training image: .* a column camera"):
        trained(
            some, tmp_path / "run", {"labels.by_camera": True, "labels.image.k1": 2, "labels.caption.k1": 2}
        )
    assert not (tmp_path / "run").exists()
