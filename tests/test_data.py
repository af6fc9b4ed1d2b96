"What no single notebook of the data sees: hostile input at large, loader processes, and the loader under accelerate."

import csv, io, json, os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from cpcl.core import UserError
from cpcl.data.read import ANNOTATIONS, SPLIT_NAMES, Split, load_person, load_split, read_image
from cpcl.data.doctor import doctor
from cpcl.data.batches import (
    AugmentConfig,
    PixelCache,
    augment,
    caption_lengths,
    collate,
    image_loader,
    pair_loader,
    tokenize,
    token_lengths,
)

EASY = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=6,
)
PIECES = st.sampled_from(
    [
        "..",
        ".",
        "",
        "imgs",
        "a.jpg",
        "sub",
        "b.jpg",
        "/",
        "\\",
        "C:",
        "\0",
        "\ud800",
        "out",
        "~",
        "$HOME",
        "%2e%2e",
        "x" * 300,
        "\u2028",
        "\n",
    ]
)
paths = (
    st.builds("/".join, st.lists(PIECES, max_size=5))
    | st.builds("\\".join, st.lists(PIECES, max_size=5))
    | st.text(max_size=8)
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "A folder with two images, and links out of it to a folder and to a file."
    base = tmp_path_factory.mktemp("data")
    root = base / "root"
    (root / "imgs" / "sub").mkdir(parents=True)
    (base / "secret").mkdir()
    for p in ("root/imgs/a.jpg", "root/imgs/sub/b.jpg", "secret/a.jpg", "a.jpg"):
        Image.new("RGB", (9, 20)).save(base / p)
    (root / "imgs" / "out").symlink_to(base / "secret")
    (root / "imgs" / "out.jpg").symlink_to(base / "a.jpg")
    return root


def read(root, name, text):
    write(root, name, text.encode("utf8", "surrogatepass"))
    return check(root, name)


def write(root, name, data):
    for files in ANNOTATIONS.values():
        for f in files:
            (root / f).unlink(missing_ok=True)
    (root / ANNOTATIONS[name][0 if name != "own" or data.lstrip()[:1] in (b"{", b"[") else 1]).write_bytes(
        data
    )


def check(root, name):
    "Whatever the annotation is, reading it gives a sane Split or a UserError of one line, and the doctor a report."
    try:
        split = load_split(root, name)
    except UserError as e:
        assert str(e) and len(str(e).split("\n")) == 1, str(e)
        assert doctor(root, name, decode=False).problems or "has no train split" in str(e)
        return None
    inside = Path(root).resolve()
    assert len(set(split.images)) == len(split.images) and all(c.strip() for c in split.captions)
    for row in range(len(split.images)):
        assert split.path(row).is_file() and inside in split.path(row).resolve().parents
    person = load_person(split)
    assert person is None or (person.dtype == np.int64 and len(person) == len(split.images))
    tokenize(split.captions)
    return split


@EASY
@given(path=paths, layout=st.sampled_from(["cuhk-pedes", "icfg-pedes", "rstpreid", "own"]))
def test_no_path_leaves_the_root(root, path, layout, promise):
    promise("fuzzed: annotations")
    if layout == "own":
        read(root, layout, json.dumps({"image": path, "caption": "a man"}))
    else:
        read(
            root,
            layout,
            json.dumps(
                [{"file_path": path, "img_path": path, "captions": ["a man"], "id": 0, "split": "train"}]
            ),
        )


@EASY
@given(data=st.data(), layout=st.sampled_from(["cuhk-pedes", "rstpreid", "own"]))
def test_absurd_values_end_in_one_line(root, data, layout, promise):
    promise("fuzzed: annotations")
    good = (
        {"image": "a.jpg", "caption": "x", "person": 1, "split": "train"}
        if layout == "own"
        else {"img_path": "a.jpg", "file_path": "a.jpg", "captions": ["x"], "id": 1, "split": "train"}
    )
    assert read(root, layout, json.dumps(good if layout == "own" else [good])) is not None
    key = data.draw(st.sampled_from(sorted(good)))
    bad = {**good, key: data.draw(anything)}
    read(root, layout, json.dumps(bad) if layout == "own" else json.dumps([bad]))


@EASY
@given(thing=anything)
def test_absurd_documents_end_in_one_line(root, thing, promise):
    promise("fuzzed: annotations")
    for layout in ("icfg-pedes", "own"):
        read(root, layout, json.dumps(thing))


@EASY
@given(text=st.text(), cut=st.integers(0, 200))
def test_absurd_text_ends_in_one_line(root, text, cut, promise):
    promise("fuzzed: annotations")
    for layout in ("cuhk-pedes", "own"):
        read(root, layout, text)
    whole = json.dumps([{"img_path": "a.jpg", "captions": ["x"], "id": 1, "split": "train"}] * 2)
    read(root, "rstpreid", whole[:cut])


WHOLE = {
    "own": b'{"image": "a.jpg", "caption": "a man \\ud83d\\ude42", "person": 1}\n{"image": "sub/b.jpg", "caption": "a woman"}\n',
    "cuhk-pedes": b'[{"split": "train", "captions": ["a man", "x"], "file_path": "a.jpg", "id": 1}, {"split": "test", "captions": ["y"], "file_path": "sub/b.jpg", "id": 2}]',
}


@EASY
@given(
    data=st.binary(max_size=60),
    cut=st.integers(0, 200),
    layout=st.sampled_from(sorted(WHOLE)),
    skip=st.integers(0, 3),
)
def test_absurd_bytes_end_in_one_line(root, data, cut, layout, skip, promise):
    promise("fuzzed: annotations")
    for bad in (data, WHOLE[layout][:cut] + data + WHOLE[layout][cut + skip :]):
        write(root, layout, bad)
        check(root, layout)


ATHERIS = """
import sys, pathlib, atheris
sys.path.insert(0, sys.argv.pop(1)); folder = pathlib.Path(sys.argv.pop(1))
with atheris.instrument_imports(include=["cpcl.data.read", "cpcl.data.batches", "open_clip.tokenizer"]): import test_data as t, cpcl.data.batches
def one(data):
    for layout in ("own", "cuhk-pedes", "rstpreid"): t.write(folder, layout, data); t.check(folder, layout)
    text = atheris.FuzzedDataProvider(data).ConsumeUnicodeNoSurrogates(200); tokens = cpcl.data.batches.tokenize([text]); cpcl.data.batches._tokens.cache_clear()
    assert tokens[0, cpcl.data.batches.token_lengths(tokens)[0] - 1] == 49407
atheris.Setup(sys.argv, one); atheris.Fuzz()
"""


@pytest.mark.slow
def test_a_guided_fuzzer_finds_nothing(root, tmp_path, promise):
    "Atheris grows its inputs by what they reach in the code; begun from whole annotations."
    pytest.importorskip("atheris")
    promise("fuzzed: annotations and tokens, by a fuzzer that watches what it reaches (atheris)", cases=4000)
    for name, data in WHOLE.items():
        (tmp_path / name).write_bytes(data)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            ATHERIS,
            str(Path(__file__).parent),
            str(root),
            "-runs=4000",
            "-max_len=400",
            "-timeout=60",
            "-rss_limit_mb=8000",
            f"-artifact_prefix={tmp_path}/found-",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert not list(tmp_path.glob("found-*")) and "Done 4000 runs" in done.stderr, done.stderr[-2000:]


@EASY
@given(
    rows=st.lists(
        st.lists(
            st.sampled_from(["a.jpg", "sub/b.jpg", "x", "", "train", "test", '"', "a,b", "\n", "../a.jpg"]),
            max_size=5,
        ),
        max_size=4,
    ),
    head=st.permutations(["image", "caption", "person", "split"]),
)
def test_absurd_tables_end_in_one_line(root, rows, head, promise):
    promise("fuzzed: annotations")
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(head)
    writer.writerows(rows)
    read(root, "own", text.getvalue())


@EASY
@given(
    noise=st.binary(max_size=60),
    where=st.integers(0, 400),
    form=st.sampled_from(["jpg", "png", "gif", "webp", "tif", "bmp"]),
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_images_end_in_one_line(tmp_path_factory, noise, where, form, promise):
    promise("fuzzed: images")
    file = tmp_path_factory.mktemp("img") / f"x.{form}"
    Image.new("RGB", (9, 20), "red").save(file)
    data = file.read_bytes()
    file.write_bytes(data[:where] + noise + data[where + len(noise) :])
    try:
        im = read_image(file)
        assert im.mode == "RGB" and im.width * im.height <= 80_000_000
    except UserError as e:
        assert str(file) in str(e) and "\n" not in str(e)


@EASY
@given(
    texts=st.lists(
        st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=4
    ),
    length=st.sampled_from([8, 24, 77]),
)
def test_a_cut_batch_loses_no_token(texts, length, promise):
    promise("fuzzed: captions and their tokens")
    tokens = tokenize(texts, length)
    used = token_lengths(tokens)
    batch = collate([{"tokens": t} for t in tokens])["tokens"]
    assert batch.shape[1] == used.max() <= length
    for t, n, row in zip(tokens, used, batch):
        assert t[n - 1] == 49407 and torch.equal(row[:n], t[:n])
    plain = [("<" not in t) for t in texts]  # "<end_of_text>" written out is the end token
    assert all(n == min(u, length) for n, u, p in zip(used, caption_lengths(texts), plain) if p)


@EASY
@given(
    h=st.integers(1, 60),
    w=st.integers(1, 60),
    pad=st.floats(0, 192),
    seed=st.integers(0, 2**32 - 1),
    low=st.floats(0.01, 0.98),
)
def test_augmentation_keeps_the_shape_and_the_original(h, w, pad, seed, low):
    image = np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)
    before = image.copy()
    out = augment(image, AugmentConfig(pad=pad, erase=1, erase_area=(low, 0.99)), np.random.default_rng(seed))
    assert (
        out.shape == image.shape
        and out.dtype == np.uint8
        and np.array_equal(image, before)
        and not np.shares_memory(out, image)
    )


# --- loaders


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    root = tmp_path_factory.mktemp("split")
    rng = np.random.default_rng(0)
    for i in range(7):
        Image.fromarray(rng.integers(0, 256, (30, 14, 3), np.uint8)).save(root / f"{i}.png")
    of = np.arange(20) % 7
    return Split(
        root,
        "own",
        "train",
        tuple(f"{i}.png" for i in range(7)),
        tuple(f"a man {'walks ' * (j % 5)}" for j in range(20)),
        of,
    )


def epoch(loader):
    "An epoch's batches as {caption row: (image row, pixels)} and the order."
    got, order = {}, []
    for b in loader:
        assert set(b) == {"image", "tokens", "image_row", "caption_row"}
        for j, i, x in zip(b["caption_row"].tolist(), b["image_row"].tolist(), b["image"]):
            got[j] = (i, x)
            order.append(j)
    return got, order


def same(a, b):
    return a[1] == b[1] and all(
        a[0][j][0] == b[0][j][0] and torch.equal(a[0][j][1], b[0][j][1]) for j in a[0]
    )


def test_batches_do_not_depend_on_workers_cache_or_batch_size(split):
    size = (24, 10)
    want = epoch(pair_loader(split, size, 6, seed=1, epoch=2))
    assert sorted(want[1]) == list(range(20)) and all(i == split.image_of[j] for j, (i, _) in want[0].items())
    cache = PixelCache(split, size).fill()
    for other in (
        pair_loader(split, size, 6, seed=1, epoch=2, workers=1),
        pair_loader(split, size, 6, seed=1, epoch=2, workers=2, cache=cache),
        pair_loader(split, size, 5, seed=1, epoch=2, cache=PixelCache(split, size)),
    ):
        assert same(want, epoch(other))
    assert not same(want, epoch(pair_loader(split, size, 6, seed=1, epoch=3)))
    rows = [torch.cat([b["image"] for b in image_loader(split, size, 4, workers=w)]) for w in (0, 1)]
    assert torch.equal(*rows)


def test_accelerate_leaves_the_epoch_alone(split):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    try:
        accelerator = Accelerator(cpu=True)
        for e in (0, 5):  # accelerate calls a dataset's set_epoch(0) by itself
            plain = epoch(pair_loader(split, (24, 10), 6, seed=1, epoch=e))
            assert same(plain, epoch(accelerator.prepare(pair_loader(split, (24, 10), 6, seed=1, epoch=e))))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_a_split_and_a_batch_know_no_person(split):
    assert not {"person", "id", "ids", "pid", "label"} & (
        set(vars(split)) | set(next(iter(pair_loader(split, (24, 10)))))
    )


def test_every_layout_reads_the_same_facts(tmp_path):
    facts = [(f"{i}.jpg", f"caption {i}", i // 2, SPLIT_NAMES[i // 2]) for i in range(6)]
    seen = set()
    for name, key, first in (
        ("cuhk-pedes", "file_path", 1),
        ("icfg-pedes", "file_path", 0),
        ("rstpreid", "img_path", 0),
        ("own", None, 0),
    ):
        for variant in ANNOTATIONS[name]:
            root = tmp_path / variant
            (root / "imgs").mkdir(parents=True)
            for f, *_ in facts:
                Image.new("RGB", (8, 20)).save(root / "imgs" / f)
            rows = [{"image": f, "caption": c, "person": p, "split": s} for f, c, p, s in facts]
            if variant.endswith(".jsonl"):
                text = "\n".join(map(json.dumps, rows))
            elif variant.endswith(".csv"):
                text = "image,caption,person,split\n" + "\n".join(
                    ",".join(map(str, r.values())) for r in rows
                )
            else:
                text = json.dumps(
                    [{key: f, "captions": [c], "id": p + first, "split": s} for f, c, p, s in facts]
                )
            (root / variant).write_text(text)
            got = [load_split(root, split=s) for s in SPLIT_NAMES]
            seen.add(
                tuple((s.images, s.captions, tuple(s.image_of), tuple(load_person(s) - first)) for s in got)
            )
            assert doctor(root).ok
    assert len(seen) == 1


def test_the_bench_set_is_frozen():
    "Captions, attributes and pixels of synth-1k, on which records rest; who changes them raises SYNTH_VERSION and runs everything again."
    from cpcl.lab.grid import BENCH
    from cpcl.synth.dataset import SYNTH_VERSION, SynthWorld, checksum

    assert (SYNTH_VERSION, BENCH) == (
        1,
        dict(people=1000, seed=1000, style="town", splits=(700, 100, 200), shots=(3, 5)),
    )
    assert (
        checksum(SynthWorld(1000, 1000, "town", (3, 5)))
        == "084cc1b9b064fb461ce6ea3288390f6a845b08328994d449aa8e0c1432acadb3"
    )
