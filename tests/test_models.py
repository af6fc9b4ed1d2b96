"Every model of open_clip's list, at reduced depth: features, a step of training, a file and back."

import json, os, subprocess, sys
from pathlib import Path

import pytest
import torch
from small_models import CAPTIONS, WORDS, check, fake_hub, kind_of_tokenizer, shallow, size_for

from cpcl.core import UserError, load_open_clip
from cpcl.encoder import Encoder, EncoderConfig, load_encoder
from cpcl.encoder.frozen import freeze
from cpcl.encoder.lora import add_adapters
from cpcl.encoder.models import checkpoint_towers

ROOT = Path(__file__).parents[1]
FAMILIES = {  # a small model of each family -> what its tokenizer pads with, None for CLIP's own
    "RN50": None,
    "convnext_tiny": None,
    "MobileCLIP2-S0": None,
    "ViTamin-S": None,
    "EVA02-B-16": None,
    "PE-Core-T-16-384": None,
    "coca_ViT-B-32": None,
    "ViT-B-16-SigLIP": 1,
}


SLOWER = ("RN50", "convnext_tiny")  # also tried, smaller, in 00_models and below


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOWER else n for n in FAMILIES]
)
def test_a_family_trains(name):
    "One model of each family has features that follow from weights and input, and learns (files: below)."
    facts = check(name, FAMILIES[name], file=name == "PE-Core-T-16-384")
    assert not facts["without"], f"parameters without a gradient: {facts['without'][:5]}"


def hub_env(home):
    "The environment of a process that sees a cache of the hub and no network."
    offline = dict(
        HF_HOME=str(home), HF_HUB_OFFLINE="1", PYTHONPATH=str(ROOT), TOKENIZERS_PARALLELISM="false"
    )
    return os.environ | offline


def in_a_process(home, *command):
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=hub_env(home), cwd=ROOT
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_every_model_of_the_list(tmp_path):
    "All names are driven, those with tokenizers and text towers of the hub by small files of that shape."
    fake_hub(tmp_path)
    names = load_open_clip().list_models()
    _, out, err = in_a_process(tmp_path, "tests/small_models.py", *names)
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [row["name"] for row in rows] == names, err[-2000:]
    failed = {row["name"]: row["error"] for row in rows if "error" in row}
    assert not failed
    without = {row["name"]: row["without"] for row in rows if row["without"]}
    assert not without


SAY = """
import sys
from cpcl.core import UserError
from cpcl.encoder import Encoder
from small_models import shallow, size_for
name = sys.argv[1]
with shallow(name):
    try:
        Encoder(name, size_for(name)).words
    except UserError as e:
        print(e)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, repo",
    {"ViT-B-16-SigLIP": "timm/ViT-B-16-SigLIP", "xlm-roberta-base-ViT-B-32": "xlm-roberta-base"}.items(),
)
def test_a_missing_file_of_the_hub_is_named(name, repo, tmp_path):
    "A tokenizer or a text tower that is not on this machine: one line with the repository and a command."
    (tmp_path / "small_models.py").write_text((ROOT / "tests" / "small_models.py").read_text())
    env = hub_env(tmp_path) | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", SAY, name], capture_output=True, text=True, env=env)
    line = done.stdout.strip()
    assert "\n" not in line and f"hf download {repo}" in line, done.stdout + done.stderr


def test_the_tokenizers_of_the_table_have_every_kind():
    "The small tokenizers mark and pad as the real ones: end tokens that pad, start tokens, none."
    repos = ("timm/ViT-B-16-SigLIP", "timm/ViT-B-16-SigLIP2", "bert-base-uncased", "xlm-roberta-base")
    assert [kind_of_tokenizer(repo) for repo in repos] == ["siglip", "t5", "bert", "roberta"]
    assert set(" ".join(CAPTIONS).split()) <= set(WORDS)


@pytest.mark.parametrize("name, cannot", {"RN50": ["image"], "EVA02-B-16": []}.items())
def test_switches_of_a_training(name, cannot):
    "Checkpointing, adapters and frozen blocks apply to other towers too; where not, the tower is named."
    torch.manual_seed(0)
    with shallow(name):
        encoder = Encoder(name, size_for(name))
        image, tokens = torch.randn(3, 3, *size_for(name)), encoder.words(CAPTIONS)
        assert checkpoint_towers(encoder.clip) == cannot
        freeze(encoder, "image:1")
        frozen = [
            n for n, p in encoder.named_parameters() if n.startswith("clip.visual.") and not p.requires_grad
        ]
        assert any("conv1" in n or "patch_embed" in n for n in frozen) and len(frozen) > 5
        adapted = Encoder(name, size_for(name)).train()
        assert add_adapters(adapted, 2) == cannot
        img, txt = adapted(image, tokens)
        (img * txt).sum().backward()
        learnt = [p.grad.abs().sum() for n, p in adapted.named_parameters() if "lora_B" in n]
        assert learnt and all(g > 0 for g in learnt)


def test_a_size_that_a_tower_does_not_take():
    "The nearest valid size is proposed, and is what an encoder without a size has."
    with pytest.raises(UserError, match="the nearest is 378x126: give --height 378 --width 126"):
        load_encoder(EncoderConfig("ViT-L-14", "", 384, 128))
    assert EncoderConfig("ViT-L-14", "openai").image_size == (378, 126)
    with pytest.raises(UserError, match="the nearest is 96x32"):
        load_encoder(EncoderConfig("RN50", "", 100, 40))
