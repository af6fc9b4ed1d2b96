"Weights are read as their tag or their file wants it, and checkpoints load in the shapes that are published."

import json
from unittest import mock

from commands import cpcl
import numpy as np
import open_clip
import pytest
import torch
from open_clip.pretrained import get_pretrained_cfg, list_pretrained

from cpcl.core import UserError
from cpcl.data.images import CLIP_MEAN, CLIP_STD, to_tensor
from cpcl.encoder import Encoder, EncoderConfig, load_encoder, save_encoder
from cpcl.encoder.towers import Reading, usual_reading
from cpcl.encoder.header import read_header
from cpcl.encoder.weights import reading_of
from cpcl.hub import CPCL, _Tower
from cpcl.synth.dataset import write_synth
from cpcl.train.checkpoint import load_run
from cpcl.train.config import make_config
from cpcl.train.start import check_run, start_run

SIZE = 384, 128
VIT = dict(  # ViT-B/16's grid and names on towers of nothing
    embed_dim=16,
    vision_cfg=dict(image_size=224, layers=2, width=16, head_width=8, patch_size=16),
    text_cfg=dict(context_length=77, vocab_size=49408, width=8, heads=2, layers=2),
)
NAME = "ViT-nano-16"


@pytest.fixture(autouse=True)
def nano(tmp_path):
    "open_clip knows two architectures more, as if their configurations had been published."
    for name, more in ((NAME, {}), (f"{NAME}-quickgelu", dict(quick_gelu=True))):
        (tmp_path / f"{name}.json").write_text(json.dumps(VIT | more))
    known = open_clip.factory._MODEL_CONFIGS
    with mock.patch.dict(known):
        for name in (NAME, f"{NAME}-quickgelu"):
            open_clip.add_model_config(tmp_path / f"{name}.json")
        yield
    open_clip.factory._rescan_model_configs()


def state_of(name=NAME, size=SIZE, seed=0):
    "Random weights in open_clip's names."
    torch.manual_seed(seed)
    return {k: torch.randn_like(x) / 4 for k, x in Encoder(name, size).clip.state_dict().items()}


def load(path, model=NAME, size=SIZE):
    "(encoder, lines of the log)."
    lines = []
    return load_encoder(EncoderConfig(model, str(path), *size), lines.append), lines


def same(encoder, state, but=("logit_scale",)):
    "Whether the towers hold these weights, given in any precision."
    held = encoder.clip.state_dict()
    names = held.keys() - set(but)
    return names <= state.keys() and all(torch.equal(held[n], state[n].float()) for n in names)


# --- what a tag says


def tags():
    "(model, tag) of open_clip's tables."
    return list_pretrained()


def test_every_tag_is_read_as_its_table_says(promise):
    "Activation, mean and deviation of all tags, whatever the models are called. Nothing is downloaded."
    pairs = list(tags())
    promise("tags are read as open_clip's tables say", cases=len(pairs))
    odd = []
    with mock.patch("open_clip.pretrained.download_pretrained", side_effect=AssertionError):
        for model, tag in pairs:
            said, reading = get_pretrained_cfg(model, tag), reading_of(EncoderConfig(model, tag, 112, 112))
            by_name = open_clip.get_model_config(model).get("quick_gelu", False)  # of roberta-ViT-B-32
            assert reading.quick_gelu == said.get("quick_gelu", by_name), (model, tag)
            assert (reading.mean, reading.std) == (said["mean"], said["std"]), (model, tag)
            odd += [(model, tag)] if reading != usual_reading(model) else []
    assert len(pairs) >= 60 and len(odd) >= 15
    assert ("ViT-B-16", "openai") in odd and ("ViT-B-16-quickgelu", "openai") not in odd
    assert ("ViT-L-14", "laion2b_s32b_b82k") in odd


def test_one_file_under_two_names_is_one_function(tmp_path):
    "A tag of QuickGELU weights gives the same towers as ViT and as ViT-quickgelu, and says so for the first."
    torch.save(state_of(size=(224, 224)), tmp_path / "openai.pt")
    table = dict(url="", hf_hub="x", quick_gelu=True, mean=CLIP_MEAN, std=CLIP_STD)
    known = {NAME: dict(openai=table), f"{NAME}-quickgelu": dict(openai=table)}
    with (
        mock.patch.dict("open_clip.pretrained._PRETRAINED", known),
        mock.patch("open_clip.pretrained.download_pretrained", return_value=str(tmp_path / "openai.pt")),
    ):
        plain, lines = load("openai")
        quick, quiet = load("openai", f"{NAME}-quickgelu")
    assert quiet == [] and len(lines) == 1
    assert (
        "openai for ViT-nano-16: read with QuickGELU, as open_clip's table has it, not with GELU" in lines[0]
    )
    gelu = Encoder(NAME, SIZE).eval()
    gelu.load_state_dict(plain.state_dict())
    image, texts = torch.randn(2, 3, *SIZE), ["a man in a red coat", "a woman"]
    with torch.no_grad():
        assert torch.equal(plain.encode_image(image), quick.encode_image(image))
        assert (plain.encode_image(image) - gelu.encode_image(image)).abs().max() > 1e-3
    assert (plain.embed_texts(texts) == quick.embed_texts(texts)).all()
    assert np.abs(plain.embed_texts(texts) - gelu.embed_texts(texts)).max() > 1e-3
    saved = save_encoder(plain, tmp_path / "plain.safetensors")
    again, lines = load(saved)
    assert again.reading == Reading(True) and lines == []
    assert (again.embed_texts(texts) == plain.embed_texts(texts)).all()


def test_an_older_file_keeps_its_meaning(tmp_path):
    "Where the name says it all, a header is what it was; without an entry it is read by the name."
    for name in (NAME, f"{NAME}-quickgelu"):
        saved = save_encoder(Encoder(name, SIZE), tmp_path / f"{name}.safetensors", epoch=3)
        assert read_header(saved).as_dict() == dict(model=name, image_size=[384, 128], grid=[24, 8], epoch=3)
        encoder, lines = load(saved, name)
        assert encoder.reading.quick_gelu == name.endswith("quickgelu") and lines == []


INCEPTION = Reading(True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_other_colours_reach_search_export_and_hub(tmp_path):
    "One normalisation outside, the one of the weights inside, and beside an exported tower."
    encoder = Encoder(NAME, (64, 32), INCEPTION).eval()
    image = np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8)
    half = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        ours = encoder.encode_image(to_tensor(image)[None])
        theirs = torch.nn.functional.normalize(encoder.clip.encode_image(half), dim=-1)
        assert torch.allclose(ours, theirs, atol=1e-5)
        assert torch.allclose(_Tower(encoder, "image")(half), theirs, atol=1e-5)  # what image.onnx holds
        assert not torch.allclose(Encoder(NAME, (64, 32)).eval().encode_image(to_tensor(image)[None]), ours)
    start_run(
        tmp_path / "run", make_config("clip", encoder=EncoderConfig(NAME, "", 64, 32)), dict(name="own")
    )
    save_encoder(encoder, tmp_path / "run" / "last.safetensors")
    model = CPCL.from_run(tmp_path / "run")
    model.save_pretrained(tmp_path / "model")
    assert "QuickGELU, mean (0.5, 0.5, 0.5)" in (tmp_path / "model" / "README.md").read_text()
    file = EncoderConfig(NAME, str(tmp_path / "model" / "model.safetensors"), 64, 32)
    lines = []
    for found in (
        load_run(tmp_path / "run"),
        CPCL.from_pretrained(tmp_path / "model"),
        load_run(tmp_path / "model"),
        load_encoder(file, lines.append),
    ):
        assert found.reading == INCEPTION
        with torch.no_grad():
            assert torch.equal(found.encode_image(to_tensor(image)[None]), ours)
    assert lines == []


def test_a_model_published_before_is_read_by_its_name(tmp_path):
    "A config.json without the entry."
    CPCL(NAME, [64, 32]).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    said = json.loads(path.read_text())
    assert said.pop("reading", None) is None
    path.write_text(json.dumps(said))
    assert (
        CPCL.from_pretrained(tmp_path / "model").reading == load_run(tmp_path / "model").reading == Reading()
    )


def test_a_run_is_not_resumed_with_another_activation(tmp_path):
    "A run of an earlier version that read a tag by the model's name."
    cfg = make_config("clip", encoder=EncoderConfig("ViT-B-16", "openai"))
    data = dict(name="own", root="/x")
    start_run(tmp_path / "run", cfg, data)
    check_run(tmp_path / "run", cfg, data, resume=True)
    with mock.patch("cpcl.train.start.about", return_value=mock.Mock(reading=Reading(True))):
        check_run(tmp_path / "run", cfg, data, resume=True)
    with mock.patch("cpcl.train.start.about", return_value=mock.Mock(reading=None)):
        with pytest.raises(UserError, match="started with GELU, but openai wants QuickGELU: start it again"):
            check_run(tmp_path / "run", cfg, data, resume=True)


# --- the shapes that others publish: names of the public programs, made here on a small architecture


def linear(name, out=16, inside=16):
    "A layer's two tensors."
    return {f"{name}.weight": torch.randn(out, inside), f"{name}.bias": torch.randn(out)}


def norm(*names):
    return {f"{n}.{part}": torch.ones(16) for n in names for part in ("weight", "bias")}


def block(name):
    "A residual attention block."
    attention = {
        f"{name}.attn.in_proj_weight": torch.randn(48, 16),
        f"{name}.attn.in_proj_bias": torch.randn(48),
    }
    return (
        attention
        | linear(f"{name}.attn.out_proj")
        | norm(f"{name}.ln_1", f"{name}.ln_2")
        | linear(f"{name}.mlp.c_fc", 64)
        | linear(f"{name}.mlp.c_proj", 16, 64)
    )


def base_model(state):
    "The towers of IRRA's family: behind base_model., without a temperature."
    return {f"base_model.{k}": x for k, x in state.items() if k != "logit_scale"}


def irra(state):
    "Implicit relation reasoning: classifier, cross attention and masked language modelling, in halves."
    attention = {"cross_attn.in_proj_weight": torch.randn(48, 16), "cross_attn.in_proj_bias": torch.randn(48)}
    heads = linear("classifier", 11) | attention | linear("cross_attn.out_proj")
    for i in range(2):
        heads |= block(f"cross_modal_transformer.resblocks.{i}")
    heads |= norm("ln_pre_t", "ln_pre_i", "ln_post", "mlm_head.ln")
    heads |= linear("mlm_head.dense") | linear("mlm_head.fc", 30)
    halves = {k: x.half() for k, x in (base_model(state) | heads).items()}
    return dict(
        model=halves, optimizer=dict(state={}, param_groups=[]), scheduler=dict(last_epoch=3), epoch=60
    )


def rde(state):
    "Token selection in both modalities, with batch norms and their counters."
    heads = {}
    for name in ("visul_emb_layer", "texual_emb_layer"):
        heads |= linear(f"{name}.linear") | linear(f"{name}.mlp.layers.0") | norm(f"{name}.mlp.bns.0")
        heads |= {f"{name}.mlp.bns.0.num_batches_tracked": torch.tensor(7)}
    return dict(model=base_model(state) | heads | linear("visul_emb_layer.fc"), epoch=60)


def icpg(state):
    "The towers, and a classifier where an identity loss was used."
    return dict(model=base_model(state) | linear("classifier_proj", 11))


def parallel(state):
    "A person-pretrained model of several processes."
    return dict(model={f"module.{k}": x for k, x in irra(state)["model"].items()}, epoch=1)


SHAPES = {
    "irra": (
        irra,
        {"classifier": 2, "cross_attn": 4, "cross_modal_transformer": 24, "mlm_head": 6, "ln_post": 2},
    ),
    "rde": (rde, {"visul_emb_layer": 9, "texual_emb_layer": 7}),
    "icpg": (icpg, {"classifier_proj": 2}),
    "person-pretrained": (parallel, {"classifier": 2, "mlm_head": 6}),
    "lightning": (lambda s: dict(state_dict={f"model.clip.{k}": x for k, x in s.items()}), {}),
    "deepspeed": (lambda s: dict(module=dict(model=s)), {}),
    "bare": (lambda s: s, {}),
    "bfloat16": (lambda s: dict(model={k: x.bfloat16() for k, x in s.items()}), {}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_published_shape_is_read(shape, tmp_path, promise):
    "Every tensor of the towers in its place, in float32; heads left out, and named with their number."
    promise("published shapes of checkpoints are read", cases=2)
    publish, heads = SHAPES[shape]
    state = state_of()
    if shape == "bfloat16":
        state = {k: x.bfloat16() for k, x in state.items()}
    elif shape in ("irra", "person-pretrained"):
        state = {k: x.half() for k, x in state.items()}
    torch.save(publish(state), tmp_path / "best.pth")
    for size, positions in ((SIZE, "positions 24x8"), ((256, 128), "positions 24x8 stretched to 16x8")):
        encoder, (line,) = load(tmp_path / "best.pth", f"{NAME}-quickgelu", size)
        kept = size == SIZE
        assert same(encoder, state, ("logit_scale", *(() if kept else ("visual.positional_embedding",))))
        assert all(x.dtype == torch.float32 for x in encoder.state_dict().values())
        assert line.startswith("note: ") and "\n" not in line
        assert f"read with QuickGELU, as usual for {NAME}-quickgelu; {positions}" in line
        assert all(f"{head} ({n})" in line for head, n in heads.items())
        assert ("left out" in line) == bool(heads)


def test_safetensors_of_others(tmp_path):
    "The same names in the other format, and another temperature that the file has."
    from safetensors.torch import save_file

    state = state_of()
    file = {f"module.base_model.{k}": x.clone() for k, x in state.items()} | linear("module.classifier")
    save_file(file, tmp_path / "best.safetensors")
    encoder, (line,) = load(tmp_path / "best.safetensors")
    assert same(encoder, state, but=()) and "left out classifier (2)" in line
    assert f"(weights made from OpenAI's want --model {NAME}-quickgelu)" in line


def test_positions_of_a_square_image_are_stretched_and_reported(tmp_path):
    torch.save(state_of(size=(224, 224)), tmp_path / "clip.pt")
    encoder, (line,) = load(tmp_path / "clip.pt")
    assert encoder.clip.visual.positional_embedding.shape == (193, 16)
    assert "positions 14x14 stretched to 24x8" in line


def test_what_is_not_read_is_refused_in_one_line(tmp_path):
    "Two models in a file, a stride that is no patch, a grid that may be two, a part that is too deep."
    state = state_of()
    table = "visual.positional_embedding"
    wrong = {
        "2 models, with the prefixes a. and b.": {f"{p}.{k}": x for p in "ab" for k, x in state.items()},
        "310 positions are no square": state | {table: torch.zeros(311, 16)},
        "e.g. transformer.resblocks.5.ln_1.bias": state
        | {"transformer.resblocks.5.ln_1.bias": torch.ones(8)},
        "e.g. text_projection": {k: x for k, x in state.items() if k != "text_projection"},
        "tensors missing, left over": linear("classifier"),
    }
    for why, odd in wrong.items():
        torch.save(dict(model=odd), tmp_path / "odd.pth")
        with pytest.raises(UserError, match=why.replace(".", r"\.")) as found:
            load(tmp_path / "odd.pth")
        assert "\n" not in str(found.value)
    torch.save(state | {table: torch.zeros(197, 16)}, tmp_path / "odd.pth")
    with pytest.raises(
        UserError, match="196 positions fit a grid of 14x14 and 28x7: choose another --height"
    ):
        load(tmp_path / "odd.pth", size=(448, 112))


class Settings:
    "What a training program stored beside its weights."


def test_a_file_that_needs_code_is_not_run(tmp_path):
    torch.save(dict(model=state_of(), args=Settings()), tmp_path / "best.pth")
    with pytest.raises(
        UserError, match=r"asks for \S*Settings\): nothing in it was run, if you trust it"
    ) as found:
        load(tmp_path / "best.pth")
    assert "\n" not in str(found.value)


# --- cpcl eval without a run


def test_eval_scores_a_checkpoint_of_others(tmp_path):
    "Facts and scores on stdout, how the file was read on stderr; the scores are those of the same towers."
    from cpcl.data import load_split
    from cpcl.train.runs import score_split

    write_synth(tmp_path / "set", people=12, seed=3, layout="cuhk-pedes", splits=(4, 2, 6))
    torch.save(irra(state_of(size=(64, 32))), tmp_path / "best.pth")
    words = ["eval", "--model", f"{NAME}-quickgelu", "--pretrained", tmp_path / "best.pth", "--root"]
    words += [tmp_path / "set", "--height", 64, "--width", 32]
    code, out, err = cpcl(*words, "--json")
    assert code == 0 and err.startswith("note: ") and err.count("\n") == 1 and "left out classifier" in err
    said = json.loads(out)
    expected = score_split(
        load(tmp_path / "best.pth", f"{NAME}-quickgelu", (64, 32))[0],
        load_split(tmp_path / "set", split="test"),
    ).mean()
    assert abs(said["text to image"]["mAP"] - expected.mAP) < 1e-3
    facts = [said[k] for k in ("model", "weights", "name", "split", "people")]
    assert facts == [f"{NAME}-quickgelu", str(tmp_path / "best.pth"), "cuhk-pedes", "test", 6]
    code, out, err = cpcl(*words, "--split", "val")
    assert code == 0 and f"the weights {tmp_path / 'best.pth'}, without a run, on cuhk-pedes" in out
    assert "val split" in out and "image to text" in out


def test_eval_of_a_run_and_of_weights_exclude_each_other(tmp_path):
    for words, why in {
        (): "nothing to score",
        ("runs/x", "--pretrained", "openai"): "not both",
        ("--model", "ViT-B-16"): "--model ViT-B-16 needs --pretrained",
        ("--pretrained", "openai"): "no file and no tag 'openai' for tiny",
    }.items():
        code, out, err = cpcl("eval", *words)
        assert (code, out) == (2, "") and err.startswith("cpcl: ") and err.count("\n") == 1 and why in err, (
            err
        )
