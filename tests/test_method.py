"What no notebook of the method tests alone: labels, memory, loss and refresh, in one process and in two."

import copy, os, subprocess, sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cpcl.core import check_labels, unit
from cpcl.hcm import Batch, HCMConfig, Prototypes, hcm_loss
from cpcl.pmm import PrototypeMemory, label_sums, prototypes

PRESETS = [
    HCMConfig(icpm=0, beta=1, pcm="none"),
    HCMConfig(pcm="none"),
    HCMConfig(pcm="single"),
    HCMConfig(pcm="none", match="pseudo", beta=1, itc_matches="negative", chm=1, chm_reduce="sum"),
    HCMConfig(),
    HCMConfig(match="pseudo"),
    HCMConfig(pcm="cross", kl="forward", beta=0.5),
]


@dataclass
class World:
    "Features and labels between two epochs, in row order. Each modality has its own clusters."

    img: np.ndarray  # `[N, D]` unit rows
    txt: np.ndarray  # `[M, D]` unit rows
    image_of: np.ndarray  # `[M]`, the image of each caption
    labels_img: np.ndarray  # `[N]`, -1 = outlier
    labels_txt: np.ndarray  # `[M]`, -1 = outlier

    def memories(self):
        "A prototype memory for each modality."
        return [
            PrototypeMemory.build(torch.from_numpy(x), torch.from_numpy(labels))
            for x, labels in ((self.img, self.labels_img), (self.txt, self.labels_txt))
        ]


def make_world(seed=0, n=40, captions=2, d=16, k=6, outliers=0.3):
    "Random features with `k` clusters of images and `k + 3` of captions, or no clusters if `k` is 0."
    rng = np.random.default_rng(seed)
    image_of = np.repeat(np.arange(n), captions)
    m = len(image_of)

    def rows(count):
        return unit(rng.standard_normal((count, d)).astype("float32"))

    def labels(count, k):
        drawn = np.where(rng.random(count) < outliers, -1, rng.integers(0, max(k, 1), count))
        drawn[:k] = np.arange(k)  # no cluster is empty
        return drawn if k else np.full(count, -1)

    return World(rows(n), rows(m), image_of, labels(n, k), labels(m, k + 3 if k else 0))


@dataclass
class Step:
    "What a training step computed."

    loss: torch.Tensor  # scalar, detached
    terms: dict  # name -> scalar
    protos: Prototypes  # that the loss saw
    batch: Batch  # features detached


class Trainer:
    "Two linear towers with an optimiser and the memories of a world."

    def __init__(self, world, cfg, d=16):
        torch.manual_seed(0)
        self.world, self.cfg, self.memories = world, cfg, world.memories()
        self.towers = [torch.nn.Linear(d, d) for _ in range(2)]
        parameters = [p for tower in self.towers for p in tower.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-2)

    def step(self, captions):
        "One training step on the pairs of these captions, as `fit` does it."
        world, row = self.world, self.world.image_of[captions]
        img = unit(self.towers[0](torch.from_numpy(world.img[row])))
        txt = unit(self.towers[1](torch.from_numpy(world.txt[captions])))
        labels = world.labels_img[row], world.labels_txt[captions]
        batch = Batch(img, txt, *(torch.from_numpy(x) for x in (row, captions, *labels)))
        protos = Prototypes(*(memory.protos for memory in self.memories))
        loss = hcm_loss(batch, protos, self.cfg)
        self.optimizer.zero_grad()
        loss.total.backward()
        self.optimizer.step()
        self.memories[0].update(img, batch.labels_img)
        self.memories[1].update(txt, batch.labels_txt)
        seen = replace(batch, img=img.detach(), txt=txt.detach())
        return Step(loss.total.detach(), loss.terms, protos, seen)


def mine_like(labels, rng):
    "What OPLM does to labels: some outliers get an existing label, and a clean label never changes."
    rescued = (labels < 0) & (rng.random(len(labels)) < 0.5)
    return np.where(rescued, rng.integers(0, labels.max() + 1, len(labels)), labels)


def test_mined_rows_move_the_prototypes():
    "The remaining outliers do not move them, and no cluster appears or disappears."
    world, rng = make_world(), np.random.default_rng(1)
    before, after = world.labels_txt, mine_like(world.labels_txt, rng)
    assert (after >= 0).sum() > (before >= 0).sum()
    assert (after < 0).any()
    assert check_labels(after) == check_labels(before)
    old, new = prototypes(world.txt, before), prototypes(world.txt, after)
    gained = np.unique(after[(after >= 0) & (before < 0)])
    changed = (old != new).any(1).nonzero()[:, 0].numpy()
    assert np.array_equal(np.sort(gained), changed)
    by_hand = unit(np.stack([world.txt[after == k].mean(0) for k in range(after.max() + 1)]))
    assert np.abs(new.numpy() - by_hand).max() < 1e-6


@pytest.mark.parametrize("clusters", (6, 1, 0))
@pytest.mark.parametrize("cfg", PRESETS, ids=str)
def test_every_preset_learns_with_and_without_clusters(cfg, clusters):
    trainer = Trainer(make_world(k=clusters), cfg)
    losses = []
    for _ in range(30):
        step = trainer.step(np.arange(24))
        assert torch.isfinite(step.loss)
        assert all(torch.isfinite(v) and not v.requires_grad for v in step.terms.values())
        losses.append(float(step.loss))
    assert losses[-1] < losses[0], losses
    assert [len(m.protos) for m in trainer.memories] == [clusters, clusters + 3 if clusters else 0]


def test_without_clusters_cpcl_equals_clip_exactly():
    weights = []
    for cfg in (HCMConfig(), HCMConfig(pcm="none")):
        trainer = Trainer(make_world(k=0), cfg)
        for s in range(5):
            trainer.step(np.arange(s * 8, s * 8 + 16))
        weights.append([p.detach().clone() for tower in trainer.towers for p in tower.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights))


def test_one_modality_may_have_no_clusters():
    "Without clusters of captions, only the terms with image prototypes remain."
    world = make_world()
    world.labels_txt[:] = -1
    step = Trainer(world, HCMConfig()).step(np.arange(24))
    assert torch.isfinite(step.loss)
    assert step.terms["pcm_t"] == step.terms["pcm_vt"] == 0
    assert step.terms["pcm_v"] > 0
    assert step.terms["pcm_tv"] > 0


def test_the_loss_sees_the_prototypes_before_the_refresh():
    "After the refresh the same batch looks easier: that would be a leak."
    cfg = HCMConfig(icpm=0)
    trainer = Trainer(make_world(), cfg)
    for s in range(3):
        before = [m.protos.clone() for m in trainer.memories]
        step = trainer.step(np.arange(s * 16, s * 16 + 24))
        assert all(torch.equal(a, b) for a, b in zip((step.protos.img, step.protos.txt), before))
        after = [m.protos for m in trainer.memories]
        assert torch.equal(hcm_loss(step.batch, Prototypes(*before), cfg).total, step.loss)
        assert hcm_loss(step.batch, Prototypes(*after), cfg).total < step.loss - 0.1


def test_state_changes_only_in_update():
    "The loss and its gradient change neither the memories nor the batch, and each memory is updated alone."
    world = make_world()
    memories = world.memories()
    before = copy.deepcopy([m.state_dict() for m in memories])
    img = torch.from_numpy(world.img[world.image_of]).requires_grad_()
    txt = torch.from_numpy(world.txt).requires_grad_()
    rows = (world.image_of, np.arange(len(world.txt)))
    labels = (world.labels_img[world.image_of], world.labels_txt)
    batch = Batch(img, txt, *(torch.from_numpy(x) for x in (*rows, *labels)))
    tensors = [x for x in vars(batch).values() if x is not None]
    copies = [x.detach().clone() for x in tensors]
    for cfg in PRESETS:
        hcm_loss(batch, Prototypes(*(m.protos for m in memories)), cfg).total.backward()

    def unchanged(memory, state):
        return all(torch.equal(memory.state_dict()[name], x) for name, x in state.items())

    assert all(map(unchanged, memories, before))
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies))
    assert not any(list(m.parameters()) for m in memories)
    memories[0].update(img, batch.labels_img)
    assert not unchanged(memories[0], before[0])
    assert unchanged(memories[1], before[1])


def test_update_keeps_no_gradient_and_no_graph():
    world = make_world()
    memory = world.memories()[0]
    x = torch.from_numpy(world.img).requires_grad_()
    memory.update(x, torch.from_numpy(world.labels_img))
    assert not memory.protos.requires_grad
    assert memory.protos.grad_fn is None
    assert x.grad is None


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    parts=st.integers(1, 8),
    mu=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    k=st.integers(0, 9),
)
def test_refresh_does_not_depend_on_processes_or_order(seed, parts, mu, k):
    "However a batch is shuffled and cut, with processes that get nothing, only its sums and counts matter."
    rng = np.random.default_rng(seed)
    world = make_world(seed, n=30, k=k)
    txt, labels = torch.from_numpy(world.txt), torch.from_numpy(world.labels_txt)
    together = PrototypeMemory.build(txt, labels, mu)
    start = together.protos
    batch = torch.from_numpy(rng.integers(0, len(labels), 24))
    x = unit(torch.from_numpy(rng.standard_normal((24, 16)).astype("float32")))
    y = labels[batch]
    together.update(x, y)
    order = torch.from_numpy(rng.permutation(24))
    cuts = np.sort(rng.integers(0, 25, parts - 1)).tolist()
    pieces = list(zip(torch.tensor_split(x[order], cuts), torch.tensor_split(y[order], cuts)))
    sums_and_counts = [label_sums(a, b, len(start)) for a, b in pieces]
    totals = tuple(map(sum, zip(*sums_and_counts)))
    for a, b in pieces:
        memory = PrototypeMemory(start, mu)
        memory.update(a, b, reduce=lambda _: totals)
        assert torch.allclose(memory.protos, together.protos, atol=2e-5)
    absent = ~torch.isin(torch.arange(len(start)), y)
    assert torch.equal(together.protos[absent], start[absent])


TWO_PROCESSES = """
import numpy as np, torch
from accelerate import Accelerator
from cpcl.core import unit
from cpcl.pmm import PrototypeMemory

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2, accelerator.num_processes
rng = np.random.default_rng(0)
x = unit(torch.from_numpy(rng.standard_normal((40, 8)).astype("float32")))
y = torch.arange(40) % 6 - 1
batches = unit(torch.from_numpy(rng.standard_normal((3, 16, 8)).astype("float32")))
labels = torch.from_numpy(rng.integers(-1, 5, (3, 16)))
share = slice(0, 5) if accelerator.process_index == 0 else slice(5, 16)

together, shared, alone = (PrototypeMemory.build(x, y) for _ in range(3))
for a, b in zip(batches, labels):
    together.update(a, b)
    shared.update(a[share], b[share], reduce=accelerator.reduce)
    alone.update(a[share], b[share])
assert torch.allclose(together.protos, shared.protos, atol=1e-6)
assert not torch.allclose(together.protos, alone.protos, atol=1e-3)
both = accelerator.gather(shared.protos[None])
assert torch.equal(both[0], both[1])
print("agreed", flush=True)
accelerator.end_training()
"""


def test_two_processes_hold_the_same_memory(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*launch, str(script)], env=env, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    assert run.stdout.count("agreed") == 2
