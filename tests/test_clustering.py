"""Labels equal to the published dense recipe's.

Stage by stage on random features of awkward kinds, and end to end on clustered sets of 8,000 and 16,000 rows.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.cluster import DBSCAN

from cpcl.cluster.labels import pseudo_labels
from cpcl.core import unit
from cpcl.cluster.dbscan import dbscan
from cpcl.cluster.jaccard import jaccard_graph, slow_jaccard
from cpcl.cluster.knn import _device_knn, knn, slow_knn

RADII = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def people(n, d=64, noise=0.75, seed=0):
    "2 to 5 rows per person, shuffled."
    rng = np.random.default_rng(seed)
    who = np.repeat(np.arange(n), rng.integers(2, 6, n))[:n]
    rng.shuffle(who)
    centre = unit(rng.standard_normal((n, d)).astype("float32"))
    return unit(centre[who] + noise * unit(rng.standard_normal((n, d)).astype("float32")))


def draw(kind, n, d, seed):
    rng = np.random.default_rng(seed)
    noise = unit(rng.standard_normal((n, d)).astype("float32"))
    if kind == "people":
        return people(n, d, rng.uniform(0.3, 1.2), seed)
    if kind == "collapsed":
        return unit(1 + 10.0 ** rng.uniform(-7, -2) * noise).astype("float32")
    if kind == "copies":
        return noise[rng.integers(0, max(1, n // rng.integers(2, 40)), n)]
    if kind == "one point":
        return unit(np.ones((n, d), "float32"))
    return noise


def oracle(J, eps, min_samples):
    return DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit_predict(J)


tally = dict(equal=0, aside=0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["people", "uniform", "collapsed", "copies", "one point"]),
    n=st.one_of(st.integers(1, 12), st.integers(13, 260)),
    d=st.sampled_from([2, 8, 33, 64]),
    k1=st.sampled_from([5, 20, 30]),
    k2=st.sampled_from([1, 3, 6]),
    seed=st.integers(0, 10**6),
)
def test_every_stage_equals_the_oracle(kind, n, d, k1, k2, seed):
    x = draw(kind, n, d, seed)
    table, sim = knn(x, k1)
    want, want_sim = slow_knn(x, k1)
    assert np.array_equal(table, want) and np.array_equal(sim, want_sim)
    J, graph = slow_jaccard(x, table, k1, k2), jaccard_graph(table, x, k1, k2, max(RADII))
    for eps in RADII:
        if (np.abs(J - eps) < 1e-6).any():
            tally["aside"] += 1
            continue
        for least in (1, 2, 4):
            assert np.array_equal(dbscan(graph, eps, least), oracle(J, eps, least)), (kind, n, eps, least)
        tally["equal"] += 1


def test_few_examples_were_set_aside():
    assert tally["equal"] > 200 and tally["aside"] < tally["equal"] / 4, tally


@pytest.mark.parametrize("n", [2_000, pytest.param(16_000, marks=pytest.mark.slow)])
def test_end_to_end_on_clustered_sets(n):
    "Features to labels against the dense float64 recipe; people of 2 to 5 rows, noisy enough for outliers."
    x = people(n, 512, 0.9, seed=n)
    J = slow_jaccard(x, slow_knn(x, 30)[0], 30, 6)
    within = int((np.abs(J - 0.6) < 1e-6).sum())
    want = oracle(J, 0.6, 4)
    del J
    assert within == 0, "no distance may be so close to eps that rounding decides"
    assert want.max() > n / 20 and 0.05 < np.mean(want < 0) < 0.4
    assert np.array_equal(pseudo_labels(x), want)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", ["people", "uniform", "collapsed", "copies"])
def test_labels_are_the_same_on_every_device(kind, device, promise, monkeypatch):
    "A tensor is searched on its device in tiles; in CPU memory the same code runs when it is asked to."
    promise("labels of features on a device equal those of the processor, whatever the tiles")
    x = draw(kind, 700, 32, 5)
    want, table = pseudo_labels(x, k1=20, eps=0.5), knn(x, 20)
    given = torch.from_numpy(x).to(device)
    if device == "cpu":
        monkeypatch.setattr("cpcl.cluster.knn.tiled_knn", lambda x, k: _device_knn(torch.from_numpy(x), k))
    for tile in (700 * 100, 2**26):
        monkeypatch.setattr("cpcl.cluster.knn.TILE", tile)
        assert all((a == b).all() for a, b in zip(knn(given, 20), table))
        assert (pseudo_labels(given, k1=20, eps=0.5) == want).all()
    assert kind != "people" or want.max() > 10
