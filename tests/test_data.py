"What no data notebook shows: hostile input in bulk, loader processes, and the loader under accelerate."

import csv, io, json, os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from cpcl.core import UserError
from cpcl.data.augment import AugmentConfig, augment
from cpcl.data.batches import collate, image_loader, pair_loader
from cpcl.data.doctor import doctor
from cpcl.data.images import PixelCache, read_image
from cpcl.data.parse import ANNOTATIONS, SPLIT_NAMES
from cpcl.data.read import Split, load_person, load_split
from cpcl.data.tokens import caption_lengths, token_lengths, tokenize

EASY = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=6,
)
PIECES = [".", "..", "", "/", "\\", "C:", "~", "$HOME", "%2e%2e", "\0", "\n", "\u2028", "\ud800", "x" * 300]
pieces = st.lists(st.sampled_from([*PIECES, "imgs", "sub", "out", "a.jpg", "b.jpg"]), max_size=5)
paths = st.builds("/".join, pieces) | st.builds("\\".join, pieces) | st.text(max_size=8)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "A folder with two images, and links to a folder and to a file outside it."
    base = tmp_path_factory.mktemp("data")
    root = base / "root"
    (root / "imgs" / "sub").mkdir(parents=True)
    (base / "secret").mkdir()
    for p in ("root/imgs/a.jpg", "root/imgs/sub/b.jpg", "secret/a.jpg", "a.jpg"):
        Image.new("RGB", (9, 20)).save(base / p)
    (root / "imgs" / "out").symlink_to(base / "secret")
    (root / "imgs" / "out.jpg").symlink_to(base / "a.jpg")
    return root


def write(root, name, data):
    "Make `data` (bytes) the only annotation of a folder; an own one that is no JSON becomes a table."
    for files in ANNOTATIONS.values():
        for f in files:
            (root / f).unlink(missing_ok=True)
    table = name == "own" and data.lstrip()[:1] not in (b"{", b"[")
    (root / ANNOTATIONS[name][1 if table else 0]).write_bytes(data)


def check(root, name):
    "Any annotation is read as a sane Split or raises a message of one line, and the doctor makes a report."
    try:
        split = load_split(root, name)
    except UserError as e:
        assert str(e) and "\n" not in str(e), str(e)
        assert doctor(root, name, decode=False).problems or "has no train split" in str(e)
        return None
    inside = Path(root).resolve()
    assert len(set(split.images)) == len(split.images)
    assert all(c.strip() for c in split.captions)
    for row in range(len(split.images)):
        assert split.path(row).is_file()
        assert inside in split.path(row).resolve().parents
    person = load_person(split)
    assert person is None or (person.dtype == np.int64 and len(person) == len(split.images))
    tokenize(split.captions)
    return split


def read(root, name, text):
    write(root, name, text.encode("utf8", "surrogatepass"))
    return check(root, name)


@EASY
@given(path=paths, layout=st.sampled_from(["cuhk-pedes", "icfg-pedes", "rstpreid", "own"]))
def test_no_path_leaves_the_root(root, path, layout, promise):
    promise("fuzzed: annotations")
    own = {"image": path, "caption": "a man"}
    benchmark = [{"file_path": path, "img_path": path, "captions": ["a man"], "id": 0, "split": "train"}]
    read(root, layout, json.dumps(own if layout == "own" else benchmark))


@EASY
@given(data=st.data(), layout=st.sampled_from(["cuhk-pedes", "rstpreid", "own"]))
def test_absurd_values_end_in_one_line(root, data, layout, promise):
    promise("fuzzed: annotations")
    own = {"image": "a.jpg", "caption": "x", "person": 1, "split": "train"}
    benchmark = {"img_path": "a.jpg", "file_path": "a.jpg", "captions": ["x"], "id": 1, "split": "train"}
    good = own if layout == "own" else benchmark

    def text(record):
        return json.dumps(record if layout == "own" else [record])

    assert read(root, layout, text(good)) is not None
    key = data.draw(st.sampled_from(sorted(good)))
    read(root, layout, text({**good, key: data.draw(anything)}))


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
    good = json.dumps([{"img_path": "a.jpg", "captions": ["x"], "id": 1, "split": "train"}] * 2)
    read(root, "rstpreid", good[:cut])


GOOD = {
    "own": (
        b'{"image": "a.jpg", "caption": "a man \\ud83d\\ude42", "person": 1}\n'
        b'{"image": "sub/b.jpg", "caption": "a woman"}\n'
    ),
    "cuhk-pedes": (
        b'[{"split": "train", "captions": ["a man", "x"], "file_path": "a.jpg", "id": 1}, '
        b'{"split": "test", "captions": ["y"], "file_path": "sub/b.jpg", "id": 2}]'
    ),
}


@EASY
@given(
    data=st.binary(max_size=60),
    cut=st.integers(0, 200),
    layout=st.sampled_from(sorted(GOOD)),
    skip=st.integers(0, 3),
)
def test_absurd_bytes_end_in_one_line(root, data, cut, layout, skip, promise):
    promise("fuzzed: annotations")
    good = GOOD[layout]
    for bad in (data, good[:cut] + data + good[cut + skip :]):
        write(root, layout, bad)
        check(root, layout)


ATHERIS = """
import pathlib, sys
import atheris

sys.path.insert(0, sys.argv.pop(1))
folder = pathlib.Path(sys.argv.pop(1))
watched = ["cpcl.data.parse", "cpcl.data.read", "cpcl.data.tokens", "open_clip.tokenizer"]
with atheris.instrument_imports(include=watched):
    import test_data
    from cpcl.data.tokens import END_OF_TEXT, _tokens, token_lengths, tokenize

def one(data):
    for layout in ("own", "cuhk-pedes", "rstpreid"):
        test_data.write(folder, layout, data)
        test_data.check(folder, layout)
    text = atheris.FuzzedDataProvider(data).ConsumeUnicodeNoSurrogates(200)
    tokens = tokenize([text])
    _tokens.cache_clear()
    assert tokens[0, token_lengths(tokens)[0] - 1] == END_OF_TEXT

atheris.Setup(sys.argv, one)
atheris.Fuzz()
"""


@pytest.mark.slow
def test_a_guided_fuzzer_finds_nothing(root, tmp_path, promise):
    "Atheris changes inputs by what code they reach, starting from correct annotations."
    pytest.importorskip("atheris")
    promise("fuzzed: annotations and tokens, by a fuzzer that watches what it reaches (atheris)", cases=4000)
    for name, data in GOOD.items():
        (tmp_path / name).write_bytes(data)
    program = [sys.executable, "-c", ATHERIS, str(Path(__file__).parent), str(root)]
    limits = ["-runs=4000", "-max_len=400", "-timeout=60", "-rss_limit_mb=8000"]
    places = [f"-artifact_prefix={tmp_path}/found-", str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*program, *limits, *places], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    assert not list(tmp_path.glob("found-*"))
    assert "Done 4000 runs" in done.stderr, done.stderr[-2000:]


CELLS = st.sampled_from(["a.jpg", "sub/b.jpg", "x", "", "train", "test", '"', "a,b", "\n", "../a.jpg"])


@EASY
@given(
    rows=st.lists(st.lists(CELLS, max_size=5), max_size=4),
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


sentences = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)


@EASY
@given(texts=st.lists(sentences, min_size=1, max_size=4), length=st.sampled_from([8, 24, 77]))
def test_a_cut_batch_loses_no_token(texts, length, promise):
    promise("fuzzed: captions and their tokens")
    tokens = tokenize(texts, length)
    used = token_lengths(tokens)
    batch = collate([{"tokens": t} for t in tokens])["tokens"]
    assert batch.shape[1] == used.max() <= length
    for t, n, row in zip(tokens, used, batch):
        assert t[n - 1] == 49407 and torch.equal(row[:n], t[:n])
    for text, n, needed in zip(texts, used, caption_lengths(texts)):
        if "<" not in text:  # "<end_of_text>" written out is the end token
            assert n == min(needed, length)


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
    assert out.shape == image.shape and out.dtype == np.uint8
    assert np.array_equal(image, before)
    assert not np.shares_memory(out, image)


# --- loaders


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    root = tmp_path_factory.mktemp("split")
    rng = np.random.default_rng(0)
    for i in range(7):
        Image.fromarray(rng.integers(0, 256, (30, 14, 3), np.uint8)).save(root / f"{i}.png")
    images = tuple(f"{i}.png" for i in range(7))
    captions = tuple(f"a man {'walks ' * (j % 5)}" for j in range(20))
    return Split(root, "own", "train", images, captions, np.arange(20) % 7)


def epoch(loader):
    "({caption row: (image row, pixels)}, the order of the caption rows) of a loader's batches."
    got, order = {}, []
    for b in loader:
        assert set(b) == {"image", "tokens", "image_row", "caption_row"}
        for j, i, x in zip(b["caption_row"].tolist(), b["image_row"].tolist(), b["image"]):
            got[j] = (i, x)
            order.append(j)
    return got, order


def same(a, b):
    "Whether two epochs have the same order, image rows and pixels."
    (a, order_a), (b, order_b) = a, b
    return order_a == order_b and all(a[j][0] == b[j][0] and torch.equal(a[j][1], b[j][1]) for j in a)


def test_batches_do_not_depend_on_workers_cache_or_batch_size(split):
    size = (24, 10)

    def loaded(batch_size=6, epoch_number=2, **how):
        return epoch(pair_loader(split, size, batch_size, seed=1, epoch=epoch_number, **how))

    want = loaded()
    assert sorted(want[1]) == list(range(20))
    assert all(i == split.image_of[j] for j, (i, _) in want[0].items())
    assert same(want, loaded(workers=1))
    assert same(want, loaded(workers=2, cache=PixelCache(split, size).fill()))
    assert same(want, loaded(batch_size=5, cache=PixelCache(split, size)))
    assert not same(want, loaded(epoch_number=3))
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
    batch = next(iter(pair_loader(split, (24, 10))))
    assert not {"person", "id", "ids", "pid", "label"} & {*vars(split), *batch}


FACTS = [(f"{i}.jpg", f"caption {i}", i // 2, SPLIT_NAMES[i // 2]) for i in range(6)]


def annotated(file, key, first):
    "The text of an annotation file that says FACTS; benchmarks have a key for the image and a first id."
    if file.endswith(".jsonl"):
        rows = [{"image": f, "caption": c, "person": p, "split": s} for f, c, p, s in FACTS]
        return "\n".join(map(json.dumps, rows))
    if file.endswith(".csv"):
        rows = [("image", "caption", "person", "split"), *FACTS]
        return "\n".join(",".join(map(str, r)) for r in rows)
    return json.dumps([{key: f, "captions": [c], "id": p + first, "split": s} for f, c, p, s in FACTS])


@pytest.mark.parametrize(
    "name, key, first",
    [
        ("cuhk-pedes", "file_path", 1),
        ("icfg-pedes", "file_path", 0),
        ("rstpreid", "img_path", 0),
        ("own", "", 0),
    ],
)
def test_every_layout_reads_the_same_facts(name, key, first, tmp_path):
    for file in ANNOTATIONS[name]:
        root = tmp_path / file
        (root / "imgs").mkdir(parents=True)
        for image, *_ in FACTS:
            Image.new("RGB", (8, 20)).save(root / "imgs" / image)
        (root / file).write_text(annotated(file, key, first))
        for k, s in enumerate(SPLIT_NAMES):
            split = load_split(root, split=s)
            assert split.images == (f"imgs/{2 * k}.jpg", f"imgs/{2 * k + 1}.jpg")
            assert split.captions == (f"caption {2 * k}", f"caption {2 * k + 1}")
            assert split.image_of.tolist() == [0, 1]
            assert (load_person(split) - first).tolist() == [k, k]
        assert doctor(root).ok


def test_the_bench_set_is_frozen():
    "Records depend on captions, attributes and pixels of synth-1k: a change needs a new SYNTH_VERSION."
    from cpcl.lab.grid import BENCH
    from cpcl.synth.dataset import SYNTH_VERSION, SynthWorld, checksum

    assert SYNTH_VERSION == 1
    assert BENCH == dict(people=1000, seed=1000, style="town", splits=(700, 100, 200), shots=(3, 5))
    found = checksum(SynthWorld(1000, 1000, "town", (3, 5)))
    assert found == "084cc1b9b064fb461ce6ea3288390f6a845b08328994d449aa8e0c1432acadb3"
