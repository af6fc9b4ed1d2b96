"Losses that are no number, labels that have collapsed, devices that differ: training goes on, or stops with a reason."

import json, math

import pytest
import torch

from cpcl.train.checkpoint import newest_state, read_history
from cpcl.core import UserError
from cpcl.data.read import load_split
from cpcl.encoder.towers import EncoderConfig
from cpcl.synth.dataset import write_synth
from cpcl.train.runs import train_run

QUICK = {"optim.epochs": 1, "optim.batch_size": 16, "labels.image.k1": 6, "labels.caption.k1": 6}
BLANK = EncoderConfig(pretrained="", height=48, width=24)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_synth(tmp_path_factory.mktemp("numbers") / "set", people=12, seed=11, splits=(8, 2, 2))


@pytest.fixture(scope="module")
def undisturbed(root, tmp_path_factory):
    return run(root, tmp_path_factory.mktemp("whole") / "run", {"optim.epochs": 2})


def run(root, out, changes=None, **more):
    "(history, lines said, run folder) of a training in this process."
    lines, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train_run(
            root,
            out,
            encoder=BLANK,
            changes=QUICK
            | {"optim.warmup": min(1, (changes or {}).get("optim.epochs", 1))}
            | (changes or {}),
            say=lines.append,
            **more,
        )
    finally:
        torch.set_num_threads(threads)
    return read_history(out), lines, out


def weights(out):
    return (out / "last.safetensors").read_bytes()


@pytest.fixture
def spoil(monkeypatch):
    "spoil(what, numbers): the loss, a feature or a gradient of these steps is not finite."
    import cpcl.train.epoch

    loss_of, step_of, count = cpcl.hcm.hcm_loss, cpcl.train.epoch.step_loss, iter(range(10**6))

    def _spoil(what, numbers):
        def _loss(*args, **kwargs):
            loss, parts = loss_of(*args, **kwargs)
            return (loss * math.inf if what == "loss" and next(count) in numbers else loss), parts

        def _step(model, batch, *args, **kwargs):
            bad = what != "loss" and next(count) in numbers
            if bad and what == "pixel":
                batch["image"][0, 0, 0, 0] = math.nan
            loss, parts, pairs = step_of(model, batch, *args, **kwargs)
            if bad and what == "gradient":
                loss = loss + (pairs.img.sum() * 0).sqrt()  # a finite loss whose gradient is not
            return loss, parts, pairs

        monkeypatch.setattr(cpcl.train.epoch, "hcm_loss", _loss)
        monkeypatch.setattr(cpcl.train.epoch, "step_loss", _step)

    return _spoil


@pytest.mark.parametrize("what", ["loss", "pixel", "gradient"])
def test_a_step_that_is_not_finite_is_left_out(what, root, tmp_path, spoil, promise):
    promise("a step whose loss, feature or gradient is not finite is left out and counted")
    spoil(what, (1, 3))
    history, lines, out = run(root, tmp_path / "run", {"optim.epochs": 2})
    assert [r["skipped"] for r in history] == [2, 0] and "2 steps left out" in "".join(lines)
    assert all(math.isfinite(v) for r in history for k, v in r.items() if isinstance(v, float))
    assert all(v.isfinite().all() for v in newest_state(out)[0].values())


def test_three_in_a_row_stop_the_run(root, tmp_path, spoil, promise):
    promise(
        "three such steps in a row stop the run, its checkpoint whole and the rows of the batches in a file"
    )
    split = load_split(root)
    steps = -(-len(split.captions) // 16)
    spoil("pixel", range(steps + 1, steps + 4))
    with pytest.raises(UserError, match="not_finite.json"):
        run(root, tmp_path / "run", {"optim.epochs": 2})
    kept = json.loads((tmp_path / "run" / "not_finite.json").read_text())
    assert [k["step"] for k in kept] == [steps + 1, steps + 2, steps + 3] and newest_state(tmp_path / "run")[
        1
    ]["epoch"] == 1
    assert all(
        k["captions"] == [split.captions[j] for j in k["caption_rows"]]
        and k["images"] == [split.images[split.image_of[j]] for j in k["caption_rows"]]
        for k in kept
    )
    history, _, _ = run(
        root, tmp_path / "run", {"optim.epochs": 2}, resume=True
    )  # what spoiled them is over: the run goes on
    assert [r["skipped"] for r in history] == [0, 0]


@pytest.mark.slow
def test_gradients_are_clipped(root, tmp_path, promise):
    promise("gradients are clipped, and a limit that nothing reaches changes no digit")
    plain, far, near = (
        run(root, tmp_path / name, changes)[2]
        for name, changes in (
            ("a", {}),
            ("b", {"optim.clip_norm": 1e9}),
            ("c", {"optim.clip_norm": 1e-6, "optim.adam_eps": 1.0}),
        )
    )
    start = run(root, tmp_path / "d", {"optim.lr": 1e-12, "optim.adam_eps": 1.0})[2]
    assert weights(plain) == weights(far) != weights(near)
    from safetensors.torch import load_file

    def moved(out):
        return max(
            float((v - w).abs().max())
            for v, w in zip(
                load_file(out / "last.safetensors").values(), load_file(start / "last.safetensors").values()
            )
        )

    assert moved(near) < 1e-6 < 1e-4 < moved(plain)


def test_precisions(root, tmp_path, promise):
    promise("bf16 only where it is computed with, double precision on request")
    run(root, tmp_path / "double", {"optim.precision": "fp64"})
    assert newest_state(tmp_path / "double")[0]["model.clip.visual.conv1.weight"].dtype == torch.float64
    with pytest.raises(UserError, match="fp32, bf16 or fp64|one of auto"):
        run(root, tmp_path / "x", {"optim.precision": "fp16"})
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="needs a GPU"):
            run(root, tmp_path / "x", {"optim.precision": "bf16"})
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_repeatable(root, tmp_path, undisturbed, promise):
    promise(
        "the same seed gives the same numbers to the last digit on a processor, with the deterministic switch too"
    )
    history, _, out = undisturbed

    def bare(rows):
        return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]

    again, _, two = run(root, tmp_path / "two", {"optim.epochs": 2})
    assert (
        bare(again) == bare(history)
        and weights(two) == weights(out)
        and (two / "result.json").read_bytes() == (out / "result.json").read_bytes()
    )
    try:
        switched, _, three = run(root, tmp_path / "three", {"optim.epochs": 2, "optim.deterministic": True})
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert bare(switched) == bare(history) and weights(three) == weights(out)
    told = json.loads((out / "environment.json").read_text())
    assert (
        all(
            told[k]
            for k in ("python", "torch", "open_clip", "numpy", "pillow", "device", "threads", "command")
        )
        and "commit" in told
    )


ALONE, ONE = {"min_samples": 1, "eps": 1e-6}, {"min_samples": 1, "eps": 0.999}
DEGENERATE = {  # settings of both modalities, clusters of both (None: more than half the rows), what is said
    "no cluster at all, every row an outlier": (
        {"min_samples": 99},
        {"min_samples": 99},
        0,
        0,
        ["images: no cluster", "captions: no cluster", "ICPM alone"],
    ),
    "one cluster": (ONE, ONE, 1, 1, ["images: one cluster only", "captions: one cluster only"]),
    "more clusters than half the rows": (
        ALONE,
        ALONE,
        None,
        None,
        ["clusters of", "more than half of them alone"],
    ),
    "one cluster of images, no caption in any": (
        ONE,
        {"min_samples": 99},
        1,
        0,
        ["images: one cluster only", "captions: no cluster"],
    ),
    "no image in a cluster, captions by themselves": (
        {"min_samples": 99},
        ALONE,
        0,
        None,
        ["images: no cluster", "captions:"],
    ),
}


@pytest.mark.parametrize(
    "preset", ["cpcl", *(pytest.param(p, marks=pytest.mark.slow) for p in ("cluster-contrast", "icpg"))]
)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_clusters(name, preset, root, tmp_path, promise):
    promise("degenerate clusters: training goes on and says what it does")
    image, caption, k_v, k_t, said = DEGENERATE[name]
    split = load_split(root)

    def wide(how, rows):
        return {"k1": rows, "k2": 1} if how is ONE else {}

    changes = {
        f"labels.{m}.{k}": v
        for m, how, rows in (("image", image, len(split.images)), ("caption", caption, len(split.captions)))
        for k, v in (how | wide(how, rows)).items()
    }
    history, lines, out = run(root, tmp_path / "run", changes | {"labels.oplm.stages": "none"}, preset=preset)

    def right(found, wanted, rows):
        return found == wanted if wanted is not None else rows / 2 < found <= rows

    assert right(history[0]["clusters_img"], k_v, len(split.images)) and math.isfinite(history[0]["loss"])
    if preset == "icpg":
        said = [s for s in said if not s.startswith("captions") and s != "ICPM alone"]
    else:
        assert right(history[0]["clusters_txt"], k_t, len(split.captions))
    for words in said:
        assert any(words in line for line in lines), (words, lines)
    assert (out / "result.json").is_file()


@pytest.mark.slow
def test_the_alarm(root, tmp_path, promise):
    promise("more than 90 % outliers for three epochs: an alarm, with the eps plot saved")
    history, lines, out = run(
        root, tmp_path / "run", {"optim.epochs": 4, "optim.batch_size": 64, "labels.caption.min_samples": 99}
    )
    rung = [i for i, line in enumerate(lines) if "ALARM" in line]
    assert len(rung) == 2 and all("captions" in lines[i] and "eps-captions.png" in lines[i] for i in rung)
    assert sum(line.startswith("epoch") for line in lines[: rung[0]]) == 2
    assert (out / "eps-captions.png").read_bytes()[:4] == b"\x89PNG" and not (out / "eps-images.png").exists()
    assert all(r["outliers_txt"] > 0.9 and r["outliers_img"] <= 0.9 for r in history)


@pytest.mark.gpu
def test_a_gpu_agrees_with_the_processor(root, tmp_path, promise, monkeypatch):
    "One epoch in float32. The tolerance, 1e-3 of a loss, is what sums in another order and another card's exp may do to 13 steps."
    promise("a GPU and the processor agree within a thousandth of every loss for one epoch")
    assert torch.cuda.is_available()
    from accelerate.state import AcceleratorState, GradientState

    def fresh():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    changes = {"optim.precision": "fp32", "labels.source": "none", "hcm.pcm": "none"}
    fresh()
    card = run(root, tmp_path / "card", changes)[0]
    fresh()
    again = run(root, tmp_path / "again", changes | {"optim.deterministic": True})[0]
    twice = run(root, tmp_path / "twice", changes | {"optim.deterministic": True})[0]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    fresh()
    plain = run(root, tmp_path / "plain", changes)[0]
    fresh()
    torch.use_deterministic_algorithms(False)
    for k in ("loss", "icpm", "itc"):
        assert abs(card[0][k] - plain[0][k]) < 1e-3 * abs(plain[0][k]), k
    assert again[0]["loss"] == twice[0]["loss"] and weights(tmp_path / "again") == weights(tmp_path / "twice")
