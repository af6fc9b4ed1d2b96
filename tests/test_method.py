"What no single notebook of the method sees: labels, memory, loss and refresh in one loop, on one process and on two."

import copy, os, subprocess, sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cpcl.core import check_labels, unit
from cpcl.hcm import HCMConfig, hcm_loss
from cpcl.pmm import PrototypeMemory, prototypes

PRESETS = [
    HCMConfig(icpm=0, beta=1, pcm="none"),
    HCMConfig(pcm="none"),
    HCMConfig(pcm="single"),
    HCMConfig(pcm="none", match="pseudo", chm=1),
    HCMConfig(),
    HCMConfig(match="pseudo"),
    HCMConfig(pcm="cross", kl="forward", beta=0.5),
]


def world(seed=0, n=40, captions=2, d=16, k=6, outliers=0.3):
    "Features and labels as they lie between two epochs: numpy, row order, some outliers, the modalities numbered apart."
    rng = np.random.default_rng(seed)
    image_of = np.repeat(np.arange(n), captions)

    def labels(m, k):
        y = np.where(rng.random(m) < outliers, -1, rng.integers(0, max(k, 1), m))
        if k:
            y[:k] = np.arange(k)
        return y if k else np.full(m, -1)

    def rows(m):
        return unit(rng.standard_normal((m, d)).astype("float32"))

    return dict(
        img=rows(n),
        txt=rows(len(image_of)),
        image_of=image_of,
        y_v=labels(n, k),
        y_t=labels(len(image_of), k + 3 if k else 0),
    )


def memories(w, **kwargs):
    return [
        PrototypeMemory.build(torch.from_numpy(w[f]), torch.from_numpy(w[y]), **kwargs)
        for f, y in (("img", "y_v"), ("txt", "y_t"))
    ]


def step(nets, opt, mems, w, j, cfg):
    "One training step of the real kind; gives the loss and the prototypes it saw."
    row = w["image_of"][j]
    img, txt = (unit(net(torch.from_numpy(w[f][r]))) for net, f, r in zip(nets, ("img", "txt"), (row, j)))
    y_v, y_t = torch.from_numpy(w["y_v"][row]), torch.from_numpy(w["y_t"][j])
    seen = [m.protos for m in mems]
    loss, parts = hcm_loss(img, txt, torch.from_numpy(row), y_v, y_t, *seen, cfg)
    opt.zero_grad()
    loss.backward()
    opt.step()
    mems[0].update(img, y_v)
    mems[1].update(txt, y_t)
    return loss.detach(), parts, seen, (img.detach(), txt.detach(), y_v, y_t)


def nets_and_optimiser(d=16, seed=0):
    torch.manual_seed(seed)
    nets = [torch.nn.Linear(d, d) for _ in range(2)]
    return nets, torch.optim.Adam([p for n in nets for p in n.parameters()], lr=1e-2)


def mine_like(y, rng):
    "What OPLM does to labels: some outliers get an existing label, a clean label never changes."
    rescued = (y < 0) & (rng.random(len(y)) < 0.5)
    return np.where(rescued, rng.integers(0, y.max() + 1, len(y)), y)


def test_memory_takes_labels_as_mining_leaves_them():
    "Mined rows move the prototypes, the remaining outliers do not, and no cluster is won or lost."
    w, rng = world(), np.random.default_rng(1)
    y = mine_like(w["y_t"], rng)
    assert (y >= 0).sum() > (w["y_t"] >= 0).sum() and (y < 0).any()
    assert check_labels(y) == check_labels(w["y_t"])
    before, after = prototypes(w["txt"], w["y_t"]), prototypes(w["txt"], y)
    gained = np.unique(y[(y >= 0) & (w["y_t"] < 0)])
    changed = (before != after).any(1).nonzero()[:, 0].numpy()
    assert np.array_equal(np.sort(gained), changed)
    by_hand = unit(np.stack([w["txt"][y == k].mean(0) for k in range(y.max() + 1)]))
    assert np.abs(after.numpy() - by_hand).max() < 1e-6


@pytest.mark.parametrize("cfg", PRESETS, ids=str)
def test_every_preset_steps_and_learns_with_and_without_clusters(cfg):
    for k in (6, 1, 0):
        w = world(k=k)
        mems = memories(w)
        nets, opt = nets_and_optimiser()
        j, losses = np.arange(24), []
        for _ in range(30):
            loss, parts, *_ = step(nets, opt, mems, w, j, cfg)
            assert torch.isfinite(loss) and all(
                torch.isfinite(v) and not v.requires_grad for v in parts.values()
            )
            losses.append(float(loss))
        assert losses[-1] < losses[0], (k, losses)
        assert [len(m.protos) for m in mems] == [k, k + 3 if k else 0]


def test_without_clusters_cpcl_is_clip_exactly():
    w, weights = world(k=0), []
    for cfg in (HCMConfig(), HCMConfig(pcm="none")):
        mems = memories(w)
        nets, opt = nets_and_optimiser()
        for s in range(5):
            step(nets, opt, mems, w, np.arange(s * 8, s * 8 + 16), cfg)
        weights.append([p.detach().clone() for n in nets for p in n.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights))


def test_one_modality_may_be_without_clusters():
    w = world()
    w["y_t"][:] = -1
    mems = memories(w)
    nets, opt = nets_and_optimiser()
    loss, parts, *_ = step(nets, opt, mems, w, np.arange(24), HCMConfig())
    assert (
        torch.isfinite(loss)
        and parts["pcm_t"] == 0
        and parts["pcm_vt"] == 0
        and parts["pcm_v"] > 0
        and parts["pcm_tv"] > 0
    )


def test_the_loss_sees_the_prototypes_before_the_refresh():
    w = world()
    mems = memories(w)
    nets, opt = nets_and_optimiser()
    cfg = HCMConfig(icpm=0)
    for s in range(3):
        start = [m.protos.clone() for m in mems]
        j = np.arange(s * 16, s * 16 + 24)
        loss, _, seen, (img, txt, y_v, y_t) = step(nets, opt, mems, w, j, cfg)
        assert all(torch.equal(a, b) for a, b in zip(seen, start))
        row = torch.from_numpy(w["image_of"][j])
        again = [hcm_loss(img, txt, row, y_v, y_t, *P, cfg)[0] for P in (start, [m.protos for m in mems])]
        assert torch.equal(again[0], loss) and again[1] < loss - 0.1, (
            "after the refresh the same batch looks easier: that is the leak to avoid"
        )


def test_state_changes_only_in_update():
    w = world()
    mems = memories(w)
    before = copy.deepcopy([m.state_dict() for m in mems])
    img = torch.from_numpy(w["img"][w["image_of"]]).requires_grad_()
    txt = torch.from_numpy(w["txt"]).requires_grad_()
    args = (
        img,
        txt,
        *(torch.from_numpy(w[k]) for k in ("image_of",)),
        torch.from_numpy(w["y_v"][w["image_of"]]),
        torch.from_numpy(w["y_t"]),
    )
    copies = [a.detach().clone() for a in args]
    for cfg in PRESETS:
        hcm_loss(*args, mems[0].protos, mems[1].protos, cfg)[0].backward()

    def same():
        return all(torch.equal(m.state_dict()[k], b[k]) for m, b in zip(mems, before) for k in b)

    assert same() and all(torch.equal(a, b) for a, b in zip(args, copies))
    assert all(len(list(m.parameters())) == 0 for m in mems)
    mems[0].update(args[0], args[3])
    assert not same() and torch.equal(mems[1].protos, before[1]["protos"]), (
        "the modalities' memories are apart"
    )


def test_update_takes_no_gradient_and_leaves_no_graph():
    w = world()
    memory = memories(w)[0]
    x = torch.from_numpy(w["img"]).requires_grad_()
    memory.update(x, torch.from_numpy(w["y_v"]))
    assert not memory.protos.requires_grad and memory.protos.grad_fn is None and x.grad is None


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000), st.integers(1, 8), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.integers(0, 9)
)
def test_refresh_is_the_same_on_any_number_of_processes_in_any_order(seed, parts, mu, k):
    "Cut the batch anywhere, shuffle it, leave processes empty: the sums and counts decide."
    from cpcl.pmm import label_sums

    rng = np.random.default_rng(seed)
    w = world(seed, n=30, k=k)
    x, y = torch.from_numpy(w["txt"]), torch.from_numpy(w["y_t"])
    whole = PrototypeMemory.build(x, y, mu)
    start = whole.protos
    batch = torch.from_numpy(rng.integers(0, len(y), 24))
    z = unit(torch.from_numpy(rng.standard_normal((24, 16)).astype("float32")))
    whole.update(z, y[batch])
    order = torch.from_numpy(rng.permutation(24))
    cuts = np.sort(rng.integers(0, 25, parts - 1)).tolist()
    pieces = list(zip(torch.tensor_split(z[order], cuts), torch.tensor_split(y[batch][order], cuts)))
    totals = tuple(map(sum, zip(*(label_sums(a, b, len(start)) for a, b in pieces))))
    for a, b in pieces:
        memory = PrototypeMemory(start, mu)
        memory.update(a, b, reduce=lambda _: totals)
        assert torch.allclose(memory.protos, whole.protos, atol=2e-5)
    absent = torch.tensor([c not in y[batch].tolist() for c in range(len(start))], dtype=torch.bool)
    assert torch.equal(whole.protos[absent], start[absent])


TWO = """
import numpy as np, torch
from accelerate import Accelerator
from cpcl.core import unit
from cpcl.pmm import PrototypeMemory
acc = Accelerator(cpu=True); assert acc.num_processes == 2, acc.num_processes
rng = np.random.default_rng(0)
x = unit(torch.from_numpy(rng.standard_normal((40, 8)).astype("float32"))); y = torch.arange(40) % 6 - 1
z = unit(torch.from_numpy(rng.standard_normal((3, 16, 8)).astype("float32"))); l = torch.from_numpy(rng.integers(-1, 5, (3, 16)))
whole, mine = PrototypeMemory.build(x, y), PrototypeMemory.build(x, y)
mine_slice = slice(0, 5) if acc.process_index == 0 else slice(5, 16)
for f, k in zip(z, l): whole.update(f, k); mine.update(f[mine_slice], k[mine_slice], reduce=acc.reduce)
assert torch.allclose(whole.protos, mine.protos, atol=1e-6)
both = acc.gather(mine.protos[None]); assert torch.equal(both[0], both[1])
alone = PrototypeMemory.build(x, y)
for f, k in zip(z, l): alone.update(f[mine_slice], k[mine_slice])
assert not torch.allclose(whole.protos, alone.protos, atol=1e-3)
print("agreed", flush=True); acc.end_training()
"""


def test_two_real_processes_hold_the_same_memory(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0 and run.stdout.count("agreed") == 2, run.stdout + run.stderr[-3000:]
