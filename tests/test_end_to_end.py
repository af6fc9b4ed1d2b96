"From files on disk to result.json through the command line, on every kind of data set."

import json, shutil

import numpy as np
import pytest
import torch

from cpcl.cli import main
from cpcl.data.read import load_person, load_split
from cpcl.synth.dataset import write_synth

SMALL = [
    *"--pretrained none --height 48 --width 24 --epochs 1".split(),
    *"--set labels.image.k1=6 labels.caption.k1=6".split(),
]


@pytest.fixture(scope="module")
def cuhk(tmp_path_factory):
    return write_synth(
        tmp_path_factory.mktemp("cuhk") / "set", people=24, seed=11, layout="cuhk-pedes", splits=(14, 4, 6)
    )


def train(root, out, *more):
    assert main(["train", "--root", str(root), "--out", str(out), *SMALL, *more]) == 0
    return json.loads((out / "result.json").read_text())


@pytest.mark.parametrize(
    "layout, split, best",
    [
        ("cuhk-pedes", "test", "val mAP"),
        ("icfg-pedes", "test", "no val: best = last"),
        ("rstpreid", "test", "val mAP"),
    ],
)
def test_train_each_layout(layout, split, best, tmp_path, capsys):
    root = write_synth(tmp_path / "set", people=24, seed=11, layout=layout, splits=(14, 4, 6))
    assert main(["doctor", str(root)]) == 0
    result = train(root, tmp_path / "run")
    assert (result["split"], result["best_by"]) == (split, best)
    assert result["last"]["queries"] == len(load_split(root, split="test").captions)
    if "no val" in best:
        assert result["best"] == result["last"]
    assert "run folder" in capsys.readouterr().out


def test_train_own_folder_without_people(cuhk, tmp_path):
    "A person's own photographs: no identity anywhere, a caption matches its own image only."
    split = load_split(cuhk, split="train")
    own = tmp_path / "own"
    own.mkdir()
    with open(own / "captions.jsonl", "w") as out:
        for j, text in enumerate(split.captions):
            source = split.path(split.image_of[j])
            name = f"{split.image_of[j]}.jpg"
            shutil.copy(source, own / name)
            out.write(json.dumps({"image": name, "caption": text}) + "\n")
    assert load_person(load_split(own)) is None
    result = train(own, tmp_path / "run")
    assert result["split"] == "train" and result["last"]["queries"] == len(split.captions)
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert "ari_img" not in history[0] and "clusters_img" in history[0]
    assert (
        main(["train", "--root", str(own), "--out", str(tmp_path / "s"), "--preset", "supervised", *SMALL])
        == 2
    )


@pytest.mark.slow
def test_supervised_alone_reads_people(cuhk, tmp_path, monkeypatch):
    "For every other preset the identities may be anything: the weights come out the same."
    import cpcl.train.runs

    def weights(run):
        return (run / "last.safetensors").read_bytes()

    for preset in ("cpcl", "icpg", "supervised"):
        train(cuhk, tmp_path / preset, "--preset", preset)
    honest = cpcl.train.runs.load_person

    def shuffled(split):
        return np.random.default_rng(0).permutation(honest(split))

    monkeypatch.setattr(cpcl.train.runs, "load_person", shuffled)
    for preset, same in (("cpcl", True), ("icpg", True), ("supervised", False)):
        train(cuhk, tmp_path / f"{preset}-wrong", "--preset", preset)
        assert (weights(tmp_path / preset) == weights(tmp_path / f"{preset}-wrong")) == same, preset


def test_bad_input_stops_before_training(cuhk, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(cuhk, copy)
    gone = load_split(copy, split="train").path(3)
    gone.unlink()
    assert main(["train", "--root", str(copy), "--out", str(tmp_path / "run"), *SMALL]) == 2
    err = capsys.readouterr().err
    assert gone.name in err and "Traceback" not in err and not (tmp_path / "run").exists()


def test_paper_size_one_step_and_a_clustering():
    "ViT-B/16 at 384x128, 77 tokens: a step of batch 4 moves the weights; 2,000 rows of its width cluster."
    from cpcl.cluster.labels import pseudo_labels
    from cpcl.train.config import make_config
    from cpcl.core import unit
    from cpcl.encoder.towers import EncoderConfig
    from cpcl.encoder.weights import load_encoder
    from cpcl.hcm import Batch, hcm_loss
    from cpcl.data.tokens import tokenize
    from cpcl.train.epoch import build_optimizer, set_learning_rate
    from cpcl.train.memories import build_memories
    from cpcl.train.labels import Features, Labels

    torch.manual_seed(0)
    cfg = make_config("cpcl", "paper", encoder=EncoderConfig("ViT-B-16-quickgelu", ""))
    encoder = load_encoder(cfg.encoder).train()
    optimizer = build_optimizer(encoder, cfg.optim)
    set_learning_rate(optimizer, 1.0)
    tokens = tokenize(["a man in a red coat " * 30] * 4)
    assert tokens.shape == (4, 77) and (tokens[:, -1] != 0).all()
    img, txt = encoder(torch.randn(4, 3, 384, 128), tokens)
    assert img.shape == txt.shape == (4, 512)
    y = np.array([0, 0, 1, -1])
    made = Features(img.detach().numpy(), txt.detach().numpy(), np.arange(4))
    memories = build_memories(made, Labels(y, y), cfg.memory, "cpu")
    rows = torch.arange(4)
    batch = Batch(img, txt, rows, rows, memories.labels_img, memories.labels_txt)
    loss = hcm_loss(batch, memories.protos, cfg.hcm).total
    before = encoder.clip.visual.conv1.weight.detach().clone()
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss) and not torch.equal(before, encoder.clip.visual.conv1.weight)
    rng = np.random.default_rng(0)
    centre = rng.standard_normal((500, 512)).astype("float32")
    features = unit(np.repeat(centre, 4, 0) + 0.6 * rng.standard_normal((2000, 512)).astype("float32"))
    labels = pseudo_labels(features)
    assert 300 < labels.max() + 1 <= 500
