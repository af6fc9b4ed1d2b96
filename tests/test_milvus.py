"""The Milvus store on a real server: the binary of PyPI's package `milvus`, where it is installed.

`pip install milvus==2.3.5` brings it (Linux x86-64); CPCL_MILVUS_SERVER=http://host:19530 names another."""

import os, shutil, uuid

import numpy as np
import pandas as pd
import pytest
from PIL import Image

pytest.importorskip("pymilvus", reason="the store needs pymilvus")
pytestmark = pytest.mark.slow

from cpcl.core import UserError, unit  # noqa: E402
from cpcl.encoder import EncoderConfig, load_encoder, save_encoder  # noqa: E402
from cpcl.search import Index  # noqa: E402
from cpcl.search.live import Ask, Live, image_key  # noqa: E402
from cpcl.search.milvus import MilvusStore, row_id  # noqa: E402
from cpcl.search.store import LocalStore  # noqa: E402
from cpcl.train import make_config  # noqa: E402
from cpcl.train.start import start_run  # noqa: E402


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    "Where a server answers."
    if given := os.environ.get("CPCL_MILVUS_SERVER"):
        yield given
        return
    why = "no server: pip install milvus==2.3.5, or name one in CPCL_MILVUS_SERVER"
    milvus = pytest.importorskip("milvus", reason=why)
    server = milvus.MilvusServer()
    server.set_base_dir(str(tmp_path_factory.mktemp("milvus")))
    try:
        server.start()
    except Exception as e:
        pytest.skip(f"the server of the package milvus does not start here: {e}")
    yield f"http://127.0.0.1:{server.listen_port}"
    server.stop()


@pytest.fixture
def store(address):
    "A store in a collection of its own."
    made = MilvusStore(address, f"cpcl_test_{uuid.uuid4().hex[:12]}")
    yield made
    if made.exists():
        made.drop()


def people(n):
    "Rows with names that hold quotes, and columns called anything, with their vectors."
    x = unit(np.random.default_rng(0).normal(size=(n, 32)).astype(np.float32))
    paths = [f"{i:04d}.jpg" for i in range(n - 1)] + ['z/"] or drop \\ é.jpg']
    rows = pd.DataFrame(dict(path=paths, size=range(n), mtime_ns=1_763_700_000_123_456_789))
    rows["camera"] = [str(i % 4) for i in range(n)]
    rows['of "whom"'] = ["a", 'b"'] * (n // 2)
    return rows, x


def same(one, other):
    "Two lists are alike, but for the order of equal scores."
    assert list(one.path) == list(other.path)
    assert one.score.to_numpy(float) == pytest.approx(other.score.to_numpy(float), abs=1e-5)
    assert not len(one) or one.drop(columns="score").equals(
        other.drop(columns="score").reset_index(drop=True)
    )


def test_it_holds_what_files_hold(store):
    "Rows that are added, replaced, removed and changed; filters; names with quotes."
    (rows, x), local = people(2500), LocalStore()
    assert (store.exists(), len(store), len(store.table())) == (False, 0, 0)
    for kept in (store, local):
        kept.add(rows[:1200], x[:1200])
        kept.add(rows[1200:], x[1200:])
        kept.finish(rows, None)
    assert len(store) == 2500 and store.table().equals(rows)
    later = rows.drop([3, 4]).reset_index(drop=True)
    later.loc[later.path == "0010.jpg", "camera"] = "9"
    later.loc[later.path == "0020.jpg", "size"] = 7
    for kept in (store, local):
        kept.add(later[later.path == "0020.jpg"], -x[:1])  # no two scores are equal
        assert kept.finish(later, None)
    assert len(store) == 2498 and store.table().equals(later) and not store.finish(later, None)
    for q, k, where in [
        (x[:3], 7, {}),
        (x[:3], 7, {"camera": ["3"]}),
        (x[5:6], 50, {"camera": ["1", "2"], 'of "whom"': ['b"']}),
        (x[:1], 3, {"camera": ['3" or "1" == "1']}),
        (x[10:11], 2, {"camera": ["9"]}),
    ]:
        for one, other in zip(store.nearest(q, k, where), local.nearest(q, k, where)):
            same(one, other)


def test_it_answers_about_single_rows(store):
    rows, x = people(60)
    store.add(rows, x)
    last = rows.path.iloc[-1]
    assert store.has(last) and not store.has("nobody.jpg")
    assert [store.has_value("camera", t) for t in ("3", "9", '3" or "1" == "1')] == [True, False, False]
    assert np.allclose(store.take([last, "0007.jpg"]), x[[59, 7]], atol=1e-6)
    assert [store.path_of(row_id(p)) for p in (last, "nobody.jpg")] == [last, None]
    with pytest.raises(UserError, match="not in the index"):
        store.take(["nobody.jpg"])
    with pytest.raises(UserError, match="16,384"):
        store.nearest(x[:1], 20_000, {})


def test_another_process_sees_what_was_added(store):
    rows, x = people(60)
    store.add(rows[:50], x[:50])
    assert len(store.table()) == 50
    another = MilvusStore(store.uri, store.collection)
    another.add(rows[50:], x[50:])
    assert (len(store.table()), len(store), len(another.table())) == (50, 60, 60)
    store.forget()
    assert len(store.table()) == 60 and store.finish(rows[:55], None) and len(another) == 55


def test_an_error_of_the_server_is_one_line(store, address):
    with pytest.raises(UserError) as e:
        store.take(["a.jpg"])  # of a collection that is not there
    assert "\n" not in str(e.value) and address in str(e.value)
    with pytest.raises(UserError, match="no Milvus answers at http://127.0.0.1:9"):
        MilvusStore("http://127.0.0.1:9", "people")


def test_an_index_is_built_served_and_built_again(address, tmp_path):
    "As `cpcl index --store milvus:...` and `cpcl serve` do; other weights mean another collection."
    start_run(tmp_path / "run", make_config("clip"), {})
    save_encoder(load_encoder(EncoderConfig()), tmp_path / "run" / "last.safetensors")
    (tmp_path / "crops").mkdir()
    for i in range(12):
        Image.new("RGB", (24, 48), (20 * i, 250 - 20 * i, 99)).save(tmp_path / "crops" / f"{i:02}.png")

    def built(name, store):
        "An index of the folder as it is now."
        return Index.build(
            tmp_path / "crops", tmp_path / "run", tmp_path / name, store=store, log=lambda line: None
        )

    served, files, asks = built("served", f"milvus:{address}"), built("files", ""), [Ask("a man", k=99)]
    with Live(tmp_path / "served", every=60) as live:
        for number in range(3):
            (one,), alone = live.ask(asks).result(60), files.search("a man", 99)
            assert len(one.hits) == 12 + (number > 0)
            assert [h["score"] for h in one.hits] == pytest.approx(list(alone.score), abs=2e-4), number
            if number == 0:  # an image more: the same collection
                Image.new("RGB", (24, 48), "red").save(tmp_path / "crops" / "12.png")
            if number == 1:  # other weights: a new collection, and the old one is dropped
                encoder, before = load_encoder(EncoderConfig()), live.index.store
                encoder.clip.logit_scale.data += 1
                save_encoder(encoder, tmp_path / "run" / "last.safetensors")
            served, files = built("served", f"milvus:{address}"), built("files", "")
        assert not before.exists() and live.index.store.collection == served.store.collection
        assert live.keys.path(image_key("12.png")) == "12.png"
    served.store.drop()
    shutil.rmtree(tmp_path / "served")
