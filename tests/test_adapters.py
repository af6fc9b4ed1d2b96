"A run with adapters: the weights stay, a plain encoder is saved, and a resumed run ends in the same bits."

import math, os, shutil, sys

import pytest
import torch
from readme import ROOT
from safetensors.torch import load_file

from cpcl.core import UserError, seed_everything
from cpcl.encoder.towers import EncoderConfig
from cpcl.encoder.weights import load_encoder
from cpcl.synth.dataset import write_synth
from cpcl.train.checkpoint import load_run, newest_state, read_history
from cpcl.train.runs import train_run

BLANK = EncoderConfig(pretrained="", height=48, width=24)
QUICK = {"optim.epochs": 2, "optim.warmup": 1, "optim.batch_size": 16}
LORA = QUICK | {"labels.image.k1": 6, "labels.caption.k1": 6, "optim.lora": 4, "optim.freeze": "text:2"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_synth(tmp_path_factory.mktemp("adapters") / "set", people=8, seed=11, splits=(5, 1, 2))


def run(root, out, **options):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train_run(root, out, encoder=BLANK, changes=LORA, log=lambda line: None, **options)
    finally:
        torch.set_num_threads(threads)
    return out


def test_a_run_with_adapters(root, tmp_path):
    out = run(root, tmp_path / "run")
    seed_everything(0)
    start, saved = load_encoder(BLANK).state_dict(), load_file(out / "last.safetensors")
    kept, learnt = {}, []
    for name, x in newest_state(out)[0].items():
        if name.startswith("model.") and "lora_" in name:
            learnt.append(name)
        elif name.startswith("model."):
            kept[name.removeprefix("model.").replace("base_layer.", "")] = x
        else:
            assert "lora_" in name  # no moments of what is not trained
    assert len(learnt) == (4 + 2) * 4 * 2  # blocks, the weights of a block, A and B
    assert kept.keys() == start.keys() and all(torch.equal(x, start[name]) for name, x in kept.items())
    assert saved.keys() == load_run(out).clip.state_dict().keys()
    changed = {name for name, x in saved.items() if not torch.equal(x, start[f"clip.{name}"])}
    assert changed == {name for name in saved if _adapted(name)}
    _resumed_as_at_once(root, out, tmp_path / "again")


def _adapted(name):
    "Whether a weight of the plain encoder has an adapter in this run."
    of_layer = name.endswith(("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight"))
    frozen = name.startswith(("transformer.resblocks.0.", "transformer.resblocks.1."))
    return of_layer and not frozen


def _resumed_as_at_once(root, out, again):
    shutil.copytree(out, again)
    os.replace(again / "state-before.safetensors", again / "state.safetensors")
    (again / "result.json").unlink()
    run(root, again, resume=True)
    for name in ("last.safetensors", "best.safetensors", "result.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_without_peft_nothing_is_started(root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'cpcl\[peft\]'"):
        run(root, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_adapters_learn_the_sample_set(tmp_path):
    changes = {"optim.epochs": 2, "optim.warmup": 1, "optim.lora": 8, "optim.lr": 5e-3}
    train_run(ROOT / "data" / "mini", tmp_path / "run", changes=changes, log=lambda line: None)
    losses = [record["loss"] for record in read_history(tmp_path / "run")]
    assert math.isfinite(losses[0]) and losses[1] < 0.9 * losses[0]
