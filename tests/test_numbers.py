"Losses that are not finite, labels that collapse, devices that differ: training continues or says why not."

import json, math
from dataclasses import dataclass

import pytest
import torch

from cpcl.core import UserError
from cpcl.data.batches import pair_loader
from cpcl.data.read import load_split
from cpcl.encoder.extract import features, float32_products
from cpcl.encoder.towers import EncoderConfig
from cpcl.encoder.weights import load_encoder
from cpcl.synth.dataset import write_synth
from cpcl.train.checkpoint import newest_state, read_history
from cpcl.train.compiled import CompiledTowers
from cpcl.train.runs import train_run

QUICK = {"optim.epochs": 1, "optim.batch_size": 16, "labels.image.k1": 6, "labels.caption.k1": 6}
BLANK = EncoderConfig(pretrained="", height=48, width=24)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_synth(tmp_path_factory.mktemp("numbers") / "set", people=12, seed=11, splits=(8, 2, 2))


@pytest.fixture(scope="module")
def undisturbed(root, tmp_path_factory):
    return run(root, tmp_path_factory.mktemp("undisturbed") / "run", {"optim.epochs": 2})


def run(root, out, changes=None, **options):
    "(history, lines reported, run folder) of a training in this process, on one thread."
    changes = QUICK | (changes or {})
    changes.setdefault("optim.warmup", min(1, changes["optim.epochs"]))
    lines, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train_run(root, out, encoder=BLANK, changes=changes, log=lines.append, **options)
    finally:
        torch.set_num_threads(threads)
    return read_history(out), lines, out


def weights(out):
    return (out / "last.safetensors").read_bytes()


@pytest.fixture
def spoil(monkeypatch):
    "spoil(what, steps): in these steps the loss, a pixel or a gradient is not finite."
    import cpcl.train.epoch as epoch

    encode_batch, as_loss, count, now = epoch.encode_batch, epoch.as_loss, iter(range(10**6)), {}

    def _spoil(what, steps):
        def _encode(model, share, *args, **kwargs):
            now["bad"] = next(count) in steps
            if now["bad"] and what == "pixel":
                share["image"][0, 0, 0, 0] = math.nan
            now["batch"] = encode_batch(model, share, *args, **kwargs)
            return now["batch"]

        def _loss(value):
            loss = as_loss(value)
            if now["bad"] and what == "loss":
                return loss._replace(total=loss.total * math.inf)
            if now["bad"] and what == "gradient":  # a finite loss whose gradient is not
                return loss._replace(total=loss.total + (now["batch"].img.sum() * 0).sqrt())
            return loss

        monkeypatch.setattr(epoch, "encode_batch", _encode)
        monkeypatch.setattr(epoch, "as_loss", _loss)

    return _spoil


@pytest.mark.parametrize("what", ["loss", "pixel", "gradient"])
def test_a_step_that_is_not_finite_is_left_out(what, root, tmp_path, spoil, promise):
    promise("a step whose loss, feature or gradient is not finite is left out and counted")
    spoil(what, (1, 3))
    history, lines, out = run(root, tmp_path / "run", {"optim.epochs": 2})
    assert [record["skipped"] for record in history] == [2, 0]
    assert "2 steps skipped" in "".join(lines)
    assert all(math.isfinite(v) for record in history for v in record.values() if isinstance(v, float))
    assert all(v.isfinite().all() for v in newest_state(out)[0].values())


def test_three_in_a_row_stop_the_run(root, tmp_path, spoil, promise):
    promise(
        "three such steps in a row stop the run, its checkpoint intact and the rows of the batches in a file"
    )
    split, out = load_split(root), tmp_path / "run"
    steps = -(-len(split.captions) // 16)  # of the first epoch
    spoil("pixel", range(steps + 1, steps + 4))
    with pytest.raises(UserError, match="not_finite.json"):
        run(root, out, {"optim.epochs": 2})
    assert newest_state(out)[1]["epoch"] == 1
    batches = json.loads((out / "not_finite.json").read_text())
    assert [batch["step"] for batch in batches] == [steps + 1, steps + 2, steps + 3]
    for batch in batches:
        rows = batch["caption_rows"]
        assert batch["captions"] == [split.captions[j] for j in rows]
        assert batch["images"] == [split.images[split.image_of[j]] for j in rows]
    history, _, _ = run(root, out, {"optim.epochs": 2}, resume=True)  # nothing is spoiled any more
    assert [record["skipped"] for record in history] == [0, 0]


@pytest.mark.slow
def test_gradients_are_clipped(root, tmp_path, promise):
    promise("gradients are clipped, and a limit that nothing reaches changes no digit")
    from safetensors.torch import load_file

    def trained(name, changes):
        return run(root, tmp_path / name, changes)[2]

    plain = trained("plain", {})
    far = trained("far", {"optim.clip_norm": 1e9})
    near = trained("near", {"optim.clip_norm": 1e-6, "optim.adam_eps": 1.0})
    assert weights(plain) == weights(far) != weights(near)
    start = load_file(trained("start", {"optim.lr": 1e-12, "optim.adam_eps": 1.0}) / "last.safetensors")

    def moved(out):
        "The largest change of a weight."
        end = load_file(out / "last.safetensors")
        return max(float((end[name] - start[name]).abs().max()) for name in start)

    assert moved(near) < 1e-6 < 1e-4 < moved(plain)


def test_precisions(root, tmp_path, promise):
    promise("bf16 only on a device that computes in it, double precision on request")
    run(root, tmp_path / "double", {"optim.precision": "fp64"})
    state = newest_state(tmp_path / "double")[0]
    assert state["model.clip.visual.conv1.weight"].dtype == torch.float64
    with pytest.raises(UserError, match="one of auto, fp32, bf16, fp16, fp64"):
        run(root, tmp_path / "x", {"optim.precision": "fp8"})
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="needs a GPU"):
            run(root, tmp_path / "x", {"optim.precision": "bf16"})
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_repeatable(root, tmp_path, undisturbed, promise):
    promise(
        "the same seed gives the same numbers to the last digit on a CPU, also with the deterministic switch"
    )
    history, _, one = undisturbed

    def without_seconds(history):
        return [{k: v for k, v in record.items() if k != "seconds"} for record in history]

    again, _, two = run(root, tmp_path / "two", {"optim.epochs": 2})
    assert without_seconds(again) == without_seconds(history)
    assert weights(two) == weights(one)
    assert (two / "result.json").read_bytes() == (one / "result.json").read_bytes()
    try:
        switched, _, three = run(root, tmp_path / "three", {"optim.epochs": 2, "optim.deterministic": True})
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert without_seconds(switched) == without_seconds(history)
    assert weights(three) == weights(one)
    environment = json.loads((one / "environment.json").read_text())
    assert "commit" in environment
    for key in ("python", "torch", "open_clip", "numpy", "pillow", "device", "threads", "command"):
        assert environment[key]


NONE, ALONE, ONE = ({"min_samples": 99}, {"min_samples": 1, "eps": 1e-6}, {"min_samples": 1, "eps": 0.999})
MANY = "more than half the rows"


@dataclass
class Degenerate:
    "Settings that give degenerate clusters, and what a training with them reports."

    image: dict  # settings of the image clusters
    caption: dict  # settings of the caption clusters
    clusters_img: int | str  # how many clusters of images are found
    clusters_txt: int | str  # how many clusters of captions are found
    reported: list  # words of the lines reported


CASES = {
    "no cluster at all, every row an outlier": Degenerate(
        NONE, NONE, 0, 0, ["images: no cluster", "captions: no cluster", "ICPM alone"]
    ),
    "one cluster": Degenerate(ONE, ONE, 1, 1, ["images: one cluster only", "captions: one cluster only"]),
    "more clusters than half the rows": Degenerate(
        ALONE, ALONE, MANY, MANY, ["clusters of", "more than half of them alone"]
    ),
    "one cluster of images, no caption in any": Degenerate(
        ONE, NONE, 1, 0, ["images: one cluster only", "captions: no cluster"]
    ),
    "no image in a cluster, each caption in its own": Degenerate(
        NONE, ALONE, 0, MANY, ["images: no cluster", "captions:"]
    ),
}


def cluster_settings(case, split):
    "The changes of the configuration for a case."
    changes = {"labels.oplm.stages": "none"}
    for modality, settings, rows in (
        ("image", case.image, len(split.images)),
        ("caption", case.caption, len(split.captions)),
    ):
        if settings is ONE:  # every row is a neighbour
            settings = settings | {"k1": rows, "k2": 1}
        changes |= {f"labels.{modality}.{name}": value for name, value in settings.items()}
    return changes


def as_many(found, wanted, rows):
    "Whether the number of clusters is the wanted one."
    return rows / 2 < found <= rows if wanted == MANY else found == wanted


@pytest.mark.parametrize(
    "preset", ["cpcl", *(pytest.param(p, marks=pytest.mark.slow) for p in ("cluster-contrast", "icpg"))]
)
@pytest.mark.parametrize("name", CASES)
def test_degenerate_clusters(name, preset, root, tmp_path, promise):
    promise("degenerate clusters: training continues and reports them")
    case, split = CASES[name], load_split(root)
    history, lines, out = run(root, tmp_path / "run", cluster_settings(case, split), preset=preset)
    first, reported = history[0], case.reported
    assert math.isfinite(first["loss"])
    assert as_many(first["clusters_img"], case.clusters_img, len(split.images))
    if preset == "icpg":  # clusters images only
        reported = [words for words in reported if not words.startswith(("captions", "ICPM alone"))]
    else:
        assert as_many(first["clusters_txt"], case.clusters_txt, len(split.captions))
    for words in reported:
        assert any(words in line for line in lines), (words, lines)
    assert (out / "result.json").is_file()


@pytest.mark.slow
def test_the_alarm(root, tmp_path, promise):
    promise("more than 90 % outliers for three epochs: an alarm, with the eps plot saved")
    changes = {"optim.epochs": 4, "optim.batch_size": 64, "labels.caption.min_samples": 99}
    history, lines, out = run(root, tmp_path / "run", changes)
    assert all(record["outliers_txt"] > 0.9 for record in history)
    assert all(record["outliers_img"] <= 0.9 for record in history)
    alarms = [i for i, line in enumerate(lines) if "ALARM" in line]
    assert len(alarms) == 2
    assert all("captions" in lines[i] and "eps-captions.png" in lines[i] for i in alarms)
    assert sum(line.startswith("epoch") for line in lines[: alarms[0]]) == 2
    assert (out / "eps-captions.png").read_bytes()[:4] == b"\x89PNG"
    assert not (out / "eps-images.png").exists()


@pytest.mark.gpu
def test_a_gpu_agrees_with_a_cpu(root, tmp_path, promise, monkeypatch):
    """One epoch in float32.

    The tolerance, 1e-3 of a loss, allows for sums in another order and another `exp` over 13 steps. Steps
    that are not asked to be deterministic take TF32, which is allowed ten times as much.
    """
    promise("a GPU and a CPU agree within a thousandth of every loss for one epoch")
    assert torch.cuda.is_available()
    from accelerate.state import AcceleratorState, GradientState

    changes = {"optim.precision": "fp32", "labels.source": "none", "hcm.pcm": "none"}

    def first_epoch(name, more=None):
        "The record of the first epoch, trained with a fresh accelerator."
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return run(root, tmp_path / name, changes | (more or {}))[0][0]

    gpu = first_epoch("gpu")
    try:
        again, twice = (first_epoch(name, {"optim.deterministic": True}) for name in ("again", "twice"))
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    cpu = first_epoch("cpu")
    for part in ("loss", "icpm", "itc"):
        assert abs(again[part] - cpu[part]) < 1e-3 * abs(cpu[part]), part
        assert abs(gpu[part] - cpu[part]) < 1e-2 * abs(cpu[part]), part
    assert again["loss"] == twice["loss"]
    assert weights(tmp_path / "again") == weights(tmp_path / "twice")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.gpu
def test_features_of_a_gpu(root):
    "In float32 those of a CPU, whatever was set before; in half precision nearly; both float32 on the host."
    encoder, split = load_encoder(BLANK), load_split(root)
    here = features(encoder, split)
    encoder.to("cuda")
    with float32_products("high"):
        there = features(encoder, split)
    rough = features(encoder, split, half=torch.bfloat16)
    for a, b, c in zip(here, there, rough):
        assert abs(a - b).max() < 1e-5 < abs(a - c).max() < 0.05
        assert b.dtype == c.dtype == a.dtype


@pytest.mark.gpu
def test_towers_compiled_on_a_gpu(root):
    "Compiled in half precision, as a run does it: the towers' features, for a full batch and a short one."
    split, encoder = load_split(root), load_encoder(BLANK).to("cuda")
    batches = list(pair_loader(split, (48, 24), 7))
    towers = CompiledTowers(encoder)
    assert len(batches[-1]["tokens"]) < 7
    for batch in (batches[0], batches[-1]):
        given = [batch[name].to("cuda") for name in ("image", "tokens")]
        with torch.autocast("cuda", torch.bfloat16):
            for a, b in zip(encoder(*given), towers(*given), strict=True):
                assert a.shape == b.shape and (a - b).abs().max() < 0.03
                b.sum().backward()
