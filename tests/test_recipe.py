"The recipe of a real run: every setting of the schedule `paper`, and what it does to words, images, weights."

import json, math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from cpcl.data.augment import ERASED, MASK_TOKEN, AugmentConfig, mask_tokens
from cpcl.data.batches import pair_loader
from cpcl.data.images import CLIP_MEAN, CLIP_STD, pixels_of, to_tensor
from cpcl.data.read import load_split
from cpcl.data.tokens import token_lengths, tokenize
from cpcl.core import keyed_rng
from cpcl.encoder import Encoder, EncoderConfig, features, load_encoder
from cpcl.encoder.header import read_header
from cpcl.hcm import HCMConfig
from cpcl.hub import CPCL
from cpcl.search.shares import encode_images
from cpcl.synth.dataset import write_synth
from cpcl.train import load_run, make_config, train_run
from cpcl.train.checkpoint import read_config
from cpcl.train.config import config_dict, config_from, loss_settings
from cpcl.train.epoch import build_optimizer
from cpcl.train.presets import PRESETS, SCHEDULES
from cpcl.train.schedule import rate_at
from cpcl.files import read_json, write_json

SETS = {"cuhk-pedes": (34054, 68126), "icfg-pedes": (34674, 34674), "rstpreid": (18505, 37010)}

# Everything that determines `cpcl` on CUHK-PEDES; where it comes from: nbs/benchmarks/recipe.
EXPECTED = {
    "preset": "cpcl",
    "seed": 0,
    "chm_after": 1 / 3,
    "encoder.model": "ViT-B-16-quickgelu",
    "encoder.pretrained": "openai",
    "encoder.resize": "bilinear",
    "optim.lr": 1e-5,
    "optim.epochs": 60,
    "optim.batch_size": 64,
    "optim.warmup": 5,
    "optim.weight_decay": 4e-5,
    "optim.bias_lr": 2.0,
    "optim.per": "epoch",
    "optim.adam_eps": 1e-3,
    "optim.clip_norm": 1000.0,  # a guard
    "optim.precision": "auto",
    "optim.deterministic": False,
    "optim.chunk": 0,
    "optim.checkpointing": False,
    "optim.compile": False,
    "optim.freeze": "",
    "optim.lora": 0,
    "optim.extended": "",
    "augment.flip": 0.5,
    "augment.pad": 10,
    "augment.erase": 0.5,
    "augment.erase_area": (0.02, 0.4),
    "augment.erase_value": "mean",
    "augment.mask": 0.15,
    "augment.second": 0.0,
    "labels.source": "clusters",
    "labels.unit": "image",
    "labels.fuse": 0.0,
    "labels.captions_per_cluster": 1,
    "labels.confidence": False,
    "labels.outliers": "keep",
    "labels.image.k1": 15,
    "labels.image.k2": 3,
    "labels.image.eps": 0.6,
    "labels.image.min_samples": 2,
    "labels.image.search": "exact",
    "labels.image.labeller": "dbscan",
    "labels.caption.k1": 30,
    "labels.caption.k2": 6,
    "labels.caption.eps": 0.6,
    "labels.caption.min_samples": 4,
    "labels.caption.search": "exact",
    "labels.caption.labeller": "dbscan",
    "labels.oplm.stages": "two-stage",
    "labels.oplm.min_sim": None,
    "labels.oplm.support": 1,
    "memory.mu": 0.1,
    "memory.refresh": True,
    "memory.mu_end": None,
    "memory.hard": False,
    "memory.shared": False,
    "memory.teacher": 0.0,
    "memory.keep": "student",
    "memory.neighbours": 3,
    "memory.least": 0.7,
    "hcm.tau_p": 0.02,
    "hcm.tau_i": 0.02,
    "hcm.tau_itc": 0.02,
    "hcm.icpm": 1.0,
    "hcm.lam": 1.0,
    "hcm.beta": 1.0,
    "hcm.itc_matches": "negative",
    "hcm.pcm": "both",
    "hcm.match": "pairs",
    "hcm.kl": "reverse",
    "hcm.chm": 0.0,
    "hcm.margin": 0.3,
    "hcm.chm_reduce": "mean",
    "hcm.gate": 0.0,  # parts of follow-ups, off
    "hcm.gate_weight": 0.1,
    "hcm.gate_by": "both",
    "hcm.near": 0.0,
    "hcm.soft": 0.0,
}
ONE_CAPTION = {"labels.image.k1": 30, "labels.image.k2": 6, "labels.image.min_samples": 4}
BY_SET = {"cuhk-pedes": {}, "icfg-pedes": ONE_CAPTION, "rstpreid": {}}
BY_PRESET = {
    "cpcl": {},
    "clip": {"labels.source": "none", "hcm.pcm": "none"},
    "clip-itc": {"labels.source": "none", "hcm.pcm": "none", "hcm.icpm": 0.0},
    "cluster-contrast": {"labels.oplm.stages": "none", "hcm.pcm": "single"},
    "icpg": {
        "labels.source": "image",
        "labels.oplm.stages": "none",
        "hcm.pcm": "none",
        "hcm.match": "pseudo",
        "hcm.chm": 1.0,
        "hcm.chm_reduce": "sum",
    },
    "dgcmia": {
        "labels.source": "none",
        "hcm.pcm": "none",
        "hcm.gate": 0.7,
        "hcm.near": 1.0,
        "augment.second": 0.5,
    },
    "clpc": {"labels.outliers": "leave", "memory.teacher": 0.995, "hcm.soft": 0.9},
    "cpcl-plus": {
        "labels.source": "image",
        "labels.outliers": "own",
        "labels.fuse": 0.25,
        "labels.by_camera": True,
        "labels.oplm.least_agreement": 0.7,
        "hcm.match": "pseudo",
        "hcm.gate": 0.9,
    },
    "supervised": {"labels.source": "person", "labels.oplm.stages": "none"},
}
REAL = EncoderConfig("ViT-B-16-quickgelu", "openai")


def settings(config):
    "A configuration as dotted names and values."

    def flat(values, above=""):
        for name, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, f"{above}{name}.")
            else:
                yield above + name, value

    return dict(flat(config_dict(config)))


def paper(preset="cpcl", data="cuhk-pedes", **more):
    images, captions = SETS[data]
    return make_config(preset, "paper", data, images, REAL, captions=captions, **more)


# --- the configuration


def test_the_tables_above_are_complete():
    assert set(BY_PRESET) == set(PRESETS) and set(BY_SET) == set(SETS)
    groups = ("optim", "augment", "memory", "hcm")  # other groups may gain fields that change nothing
    ours = {name for name in settings(paper()) if name.startswith(groups)}
    assert ours == {name for name in EXPECTED if name.startswith(groups)}


@pytest.mark.parametrize("data", SETS)
@pytest.mark.parametrize("preset", BY_PRESET)
def test_every_setting_of_the_real_run(preset, data):
    wanted = EXPECTED | BY_SET[data] | BY_PRESET[preset] | {"preset": preset}
    found = settings(paper(preset, data))
    assert {name: found[name] for name in wanted} == wanted
    assert paper(preset, data).encoder.image_size == (384, 128)
    assert paper(preset, data) == make_config(preset, "paper", data, SETS[data][0], REAL)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("data", [*SETS, "own"])
def test_supervised_is_cpcl_with_other_labels(schedule, data):
    images, captions = SETS.get(data, (900, 1800))
    cpcl, bound = (
        settings(make_config(preset, schedule, data, images, captions=captions))
        for preset in ("cpcl", "supervised")
    )
    differ = {name: (cpcl[name], bound[name]) for name in cpcl if cpcl[name] != bound[name]}
    assert differ == {
        "preset": ("cpcl", "supervised"),
        "labels.source": ("clusters", "person"),
        "labels.oplm.stages": ("two-stage", "none"),  # nothing is missing that could be mined
    }


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_presets_of_a_schedule_share_their_budget(preset, schedule):
    one_view = {"augment.second": 0}  # the second view is DGCMIA's method
    config, cpcl = (make_config(name, schedule, changes=one_view) for name in (preset, "cpcl"))
    for part in ("seed", "encoder", "optim", "augment"):
        assert getattr(config, part) == getattr(cpcl, part), part


@pytest.mark.parametrize("preset", PRESETS)
def test_masking_is_a_switch_of_every_preset(preset):
    off = paper(preset, changes={"augment.mask": 0})
    assert off == replace(paper(preset), augment=replace(paper(preset).augment, mask=0.0))
    assert make_config(preset, "bench", changes={"augment.mask": 0.15}).augment.mask == 0.15


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_icpg_is_as_published_in_every_schedule(schedule):
    hcm = make_config("icpg", schedule).hcm
    assert (hcm.icpm, hcm.beta, hcm.chm, hcm.pcm) == (1, 1, 1, "none")
    assert (hcm.match, hcm.itc_matches, hcm.chm_reduce, hcm.margin) == ("pseudo", "negative", "sum", 0.3)


def test_chm_starts_after_a_third_of_the_epochs():
    "ICPG: from its 21st epoch of 60."
    weights = [loss_settings(paper("icpg"), epoch).chm for epoch in range(60)]
    assert weights == [0] * 20 + [1] * 40


def test_a_configuration_from_before_these_settings_means_what_it_meant():
    new = {"encoder": "resize", "augment": "erase_value", "hcm": "chm_reduce"}
    for schedule in ("tiny", "bench"):
        config = make_config("cpcl", schedule)
        values = config_dict(config)
        for group, field in new.items():
            del values[group][field]
        assert config_from(json.loads(json.dumps(values))) == config
    assert (AugmentConfig().erase_value, HCMConfig().chm_reduce) == ("zero", "mean")
    assert load_encoder(EncoderConfig(pretrained="", height=48, width=24)).resize == "bicubic"


# --- the optimiser


def published_rate(epoch, epochs=60, warmup=5):
    "IRRA's scheduler, in words: from a tenth in a straight line, then half a cosine to zero."
    if epoch < warmup:
        return 0.1 * (1 - epoch / warmup) + epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def test_the_learning_rate_is_the_published_one():
    config = paper().optim
    for epoch in range(60):
        for step in (0, 500, 1064):
            assert rate_at(config, epoch, step, 1065) == pytest.approx(published_rate(epoch), abs=1e-12)


def test_the_groups_of_adam():
    config = paper().optim
    model = Encoder("tiny")
    optimizer = build_optimizer(model, config)
    assert type(optimizer) is torch.optim.Adam
    weights, biases, tables = optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {"bias" in names[id(p)] for p in weights["params"]} == {False}
    assert {"bias" in names[id(p)] for p in biases["params"]} == {True}
    found = {names[id(p)].removeprefix("clip.") for p in tables["params"]}
    assert found == {"token_embedding.weight", "positional_embedding", "visual.positional_embedding"}
    every = [*weights["params"], *biases["params"], *tables["params"]]
    assert {id(p) for p in every} == {id(p) for p in model.parameters() if p.requires_grad}
    for group, lr, decay in ((weights, 1e-5, 4e-5), (biases, 2e-5, 0), (tables, 1e-5, 0)):
        assert (group["base"], group["weight_decay"]) == (lr, decay)
        assert (group["eps"], group["betas"], group["amsgrad"]) == (1e-3, (0.9, 0.999), False)


def test_a_step_of_adam_by_hand():
    "eps is added to the root of the second moment, and the decay is part of the gradient."
    layer = torch.nn.Linear(1, 1).double()
    torch.nn.init.constant_(layer.weight, 2.0)
    torch.nn.init.constant_(layer.bias, 3.0)
    optimizer = build_optimizer(layer, replace(paper().optim, lr=0.1))
    for group in optimizer.param_groups:
        group["lr"] = group["base"]
    layer.weight.grad, layer.bias.grad = torch.full((1, 1), 5e-4).double(), torch.full((1,), 5e-4).double()
    optimizer.step()
    decayed = 5e-4 + 4e-5 * 2
    assert layer.weight.item() == pytest.approx(2 - 0.1 * decayed / (decayed + 1e-3), abs=1e-7)
    assert layer.bias.item() == pytest.approx(3 - 0.2 * 5e-4 / (5e-4 + 1e-3), abs=1e-7)


# --- images


def published_transform(size):
    "Reading an image as IRRA, ICPG, CLPC and DGCMIA do."
    return T.Compose([T.Resize(size), T.ToTensor(), T.Normalize(CLIP_MEAN, CLIP_STD)])


@pytest.mark.parametrize("size", [(384, 128), (96, 40)])
@pytest.mark.parametrize("shape", [(161, 67), (512, 190), (97, 40)])
def test_bilinear_images_are_those_of_the_published_code(shape, size):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8))
    ours = to_tensor(pixels_of(photo, size, paper().encoder.resize))
    assert torch.allclose(ours, published_transform(size)(photo), atol=1e-6)


def test_erased_pixels_hold_the_mean_after_normalising():
    colour = ERASED[paper().augment.erase_value]
    found = to_tensor(np.broadcast_to(colour, (2, 2, 3)))[:, 0, 0]
    erasing = T.RandomErasing(p=1, scale=(0.02, 0.4), value=CLIP_MEAN)
    torch.manual_seed(0)
    published = erasing(torch.full((3, 64, 64), 9.0))
    published = published[:, (published != 9).all(0)].unique(dim=1)[:, 0]
    assert torch.allclose(found, published, atol=0.5 / 255 / min(CLIP_STD))  # half a step of 8 bits
    assert to_tensor(np.broadcast_to(ERASED["zero"], (2, 2, 3))).abs().max() < 0.01


# --- masking


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "The smallest data set that trains, and its folder."
    root = tmp_path_factory.mktemp("recipe") / "set"
    return write_synth(root, people=12, seed=3, splits=(8, 2, 2))


def by_caption(loader):
    "caption row -> its tokens, of an epoch."
    rows = {}
    for batch in loader:
        for row, tokens in zip(batch["caption_row"].tolist(), batch["tokens"]):
            rows[row] = tokens[: int(token_lengths(tokens[None])[0])].tolist()
    return rows


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_masked_words_depend_on_seed_epoch_and_row_alone(workers, small):
    split, augment = load_split(small), paper().augment
    plain = tokenize(split.captions)

    def epoch(seed, epoch, batch_size=5, workers=workers):
        loader = pair_loader(split, (48, 24), batch_size, augment, seed, epoch, workers=workers)
        return by_caption(loader)

    found = epoch(7, 3)
    assert sorted(found) == list(range(len(split.captions)))
    for row, tokens in found.items():
        n = int(token_lengths(plain[row][None])[0])
        wanted = mask_tokens(plain[row], 0.15, keyed_rng(7, 3, row, 1))
        assert tokens == wanted[:n].tolist()
        assert (tokens[0], tokens[-1], len(tokens)) == (plain[row, 0], plain[row, n - 1], n)
    assert epoch(7, 3, batch_size=11) == found
    if not workers:
        assert epoch(7, 4) != found and epoch(8, 3) != found


def test_the_shares_of_masking():
    "15 % of the words; of these 80 % become the mask, 10 % another word, 10 % stay. Nothing else changes."
    caption = tokenize("a tall woman in a long red coat with a black backpack and white shoes")[0]
    n = int(token_lengths(caption[None])[0])
    draws = torch.stack([mask_tokens(caption, 0.15, keyed_rng(1, i)) for i in range(4000)])
    words, true = draws[:, 1 : n - 1], caption[1 : n - 1]
    assert torch.equal(draws[:, [0]], caption[[0]].expand(4000, 1))
    assert torch.equal(draws[:, n - 1 :], caption[n - 1 :].expand(4000, 77 - n + 1))
    mask = words == MASK_TOKEN
    other = ~mask & (words != true)
    for found, share in ((mask, 0.15 * 0.8), (other, 0.15 * 0.1)):
        error = 4 * (share * (1 - share) / words.numel()) ** 0.5
        assert abs(found.float().mean().item() - share) < error
        places = found.float().mean(0)  # every place alike
        assert (places - share).abs().max() < 4.5 * (share * (1 - share) / 4000) ** 0.5
    swapped = words[other]
    assert 1 <= swapped.min() < 2000 and 47_000 < swapped.max() < MASK_TOKEN
    chosen = torch.stack([mask_tokens(caption, 1.0, keyed_rng(2, i)) for i in range(4000)])[:, 1 : n - 1]
    stay = (chosen == true).float().mean().item()
    assert abs(stay - 0.1) < 4 * (0.1 * 0.9 / chosen.numel()) ** 0.5


# --- a run


@pytest.fixture(scope="module")
def run(small):
    "A run of the schedule `paper`, made short, and the tokens that its text tower saw, by mode."
    seen = {True: [], False: []}
    encode = Encoder.encode_text

    def spy(self, tokens):
        seen[self.training].append(tokens.clone())
        return encode(self, tokens)

    tower = EncoderConfig(pretrained="", height=48, width=24)
    short = {"optim.epochs": 1, "optim.warmup": 0, "optim.batch_size": 16, "augment.mask": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "encode_text", spy)
        train_run(
            *(small, small.parent / "run", None, "cpcl", "paper", tower),
            changes=short,
            log=lambda line: None,
        )
    return small.parent / "run", seen


def test_words_are_masked_in_training_steps_alone(run):
    _, seen = run
    assert any((tokens == MASK_TOKEN).any() for tokens in seen[True])
    assert len(seen[False]) >= 3, "features of train, val and test"
    assert not any((tokens == MASK_TOKEN).any() for tokens in seen[False])


def test_one_filter_from_training_to_search(run, small, tmp_path):
    "Steps, evaluation, the stored encoder, a published model, an index: all resize as the run says."
    folder, _ = run
    assert read_config(folder).encoder.resize == "bilinear"
    encoder, split = load_run(folder), load_split(small)
    assert (encoder.resize, read_header(folder / "last.safetensors").resize) == ("bilinear",) * 2
    CPCL.from_run(folder).save_pretrained(tmp_path / "published")
    published = [CPCL.from_pretrained(tmp_path / "published"), load_run(tmp_path / "published")]
    assert [model.resize for model in published] == ["bilinear"] * 2
    files = [split.path(row) for row in range(4)]
    pixels = torch.stack([to_tensor(pixels_of(file, (48, 24), "bilinear")) for file in files])
    with torch.inference_mode():
        wanted = encoder.encode_image(pixels).numpy()
    for model in (encoder, *published):
        assert np.allclose(model.embed_images(files), wanted, atol=1e-6)
        assert np.allclose(encode_images(model, files)[0], wanted, atol=1e-6)
        assert np.allclose(features(model, split)[0][:4], wanted, atol=1e-6)
    other = load_encoder(replace(read_config(folder).encoder, resize="bicubic"))
    assert not np.allclose(other.embed_images(files), wanted, atol=1e-4)


def test_a_run_from_before_the_filter_was_a_setting_is_bicubic(run, small, tmp_path):
    "Neither its configuration nor its file names one."
    tower = EncoderConfig(pretrained="", height=48, width=24)
    old = tmp_path / "old"
    train_run(
        *(small, old, None, "clip", "tiny", tower), changes={"optim.epochs": 1, "optim.warmup": 0}, log=str
    )
    values = read_json(old / "config.json")
    assert "resize" not in read_header(old / "last.safetensors").as_dict()
    del values["config"]["encoder"]["resize"], values["config"]["augment"]["erase_value"]
    write_json(old / "config.json", values)
    assert (load_run(old).resize, CPCL.from_run(old).resize) == ("bicubic", "bicubic")
    assert read_config(old).augment == AugmentConfig()
