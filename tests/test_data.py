"What no data notebook shows: hostile input in bulk, loader processes, and the loader under accelerate."

import csv, html, io, json, os, subprocess, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from cpcl.core import UserError
from cpcl.data.augment import AugmentConfig, augment
from cpcl.data.batches import ImagesOn, PairsOn, collate, image_loader, pair_loader
from cpcl.data.doctor import doctor
from cpcl.data.images import PixelCache, pixels_of, read_image
from cpcl.data.locate import IMAGE_SUFFIXES
from cpcl.data.parse import ANNOTATIONS, SPLIT_NAMES
from cpcl.data.read import Split, load_person, load_split
from cpcl.data.tokens import caption_lengths, cut_captions, has_control_words, token_lengths, tokenize
from cpcl.data.tokens import unseen_text

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
    # a process's peak begins with that of its parent, which may have clustered a large set: no limit to it
    limits = ["-runs=4000", "-max_len=400", "-timeout=60", "-rss_limit_mb=0", "-malloc_limit_mb=8000"]
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


MODES = "1 L P RGB RGBA CMYK YCbCr LAB HSV I F LA PA RGBX RGBa La I;16 I;16B".split()
FORMATS = {  # suffix -> modes that it holds
    "png": "1 L LA I;16 P RGB RGBA".split(),
    "jpg": "L RGB CMYK".split(),
    "tif": "1 L LA P RGB RGBA CMYK LAB I F I;16".split(),
    "webp": "RGB RGBA".split(),
    "gif": "L P".split(),
    "avif": "RGB RGBA".split(),
    "jp2": "L LA RGB RGBA".split(),
}
PAINTED = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 12, 4), np.uint8), "RGBA")


def in_mode(mode):
    "A picture in a mode of Pillow's, transparent in places where the mode allows it."
    if mode in ("I", "I;16", "I;16B"):
        return Image.fromarray(np.asarray(PAINTED)[..., 0].astype(np.int32) * 200).convert(mode)
    if mode == "PA":
        return PAINTED.convert("LA").convert("PA")
    steps = {"LAB": ["RGB"], "HSV": ["RGB"], "La": ["LA"], "F": ["L"], "YCbCr": ["RGB"], "P": ["RGB"]}
    found = PAINTED
    for step in [*steps.get(mode, []), mode]:
        found = found.convert(step)
    return found


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_an_image_and_its_file_are_the_same_pixels(suffix, turn, tmp_path, promise):
    promise("a PIL image and its file are the same pixels", cases=3 * len(FORMATS[suffix]))
    exif = Image.Exif()
    exif[274] = turn
    for mode in FORMATS[suffix]:
        file = tmp_path / f"{mode.replace(';', '_')}.{suffix}"
        more = {} if suffix in ("gif", "jp2") else dict(exif=exif)
        if mode == "P":
            more["transparency"] = 3
        in_mode(mode).save(file, **more)
        want = pixels_of(file, (20, 10))
        with Image.open(file) as opened:  # not loaded
            assert np.array_equal(pixels_of(opened, (20, 10)), want), mode
            assert np.array_equal(pixels_of(opened, (20, 10)), want), "asked again"
        with Image.open(file) as opened:
            opened.load()
            assert np.array_equal(pixels_of(opened.copy(), (20, 10)), want), mode


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode, promise):
    promise("a PIL image and its file are the same pixels")
    image = in_mode(mode)
    before = image.tobytes(), image.mode
    found = pixels_of(image, (24, 12))
    assert found.shape == (24, 12, 3) and found.std() > 10
    assert (image.tobytes(), image.mode) == before, "the user's image was changed"


def test_arrays_and_bytes_are_no_images(promise):
    odd = [np.zeros((9, 9, 3), np.uint8), b"\xff\xd8", None, 7, torch.zeros(3), [1]]
    promise("a PIL image and its file are the same pixels", cases=len(odd))
    for thing in odd:
        with pytest.raises(UserError, match="must be a file or a PIL image, got a") as e:
            pixels_of(thing, (9, 9))
        assert "\n" not in str(e.value) and len(str(e.value)) < 300


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".JPG", ".avif", ".jp2"])
def test_suffixes_of_images_are_read(suffix, tmp_path):
    assert suffix.lower() in IMAGE_SUFFIXES
    PAINTED.convert("RGB").save(tmp_path / f"a{suffix}", {".jfif": "JPEG"}.get(suffix))
    assert read_image(tmp_path / f"a{suffix}").size == (12, 24)


def test_heic_is_read_where_pillow_can(tmp_path):
    "With a package of that name, which teaches Pillow the format, the suffix is known and the file is read."
    (tmp_path / "pillow_heif.py").write_text(
        "from PIL import Image\n"
        "def register_heif_opener():\n"
        "    Image.register_open('HEIF', lambda *file: Image.new('RGB', (3, 4)), lambda s: b'ftyp' in s)\n"
    )
    code = (
        "import sys\nfrom cpcl.data.images import *\nfrom cpcl.data.locate import IMAGE_SUFFIXES\n"
        "print('.heic' in IMAGE_SUFFIXES, read_image(sys.argv[1]).size)"
    )
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 50)
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.heic")],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "True (3, 4)\n", done


WRITTEN = {  # how a table or a name is written -> (name on the disk, name of the table, its text)
    "tabs": ("a.jpg", "a.jpg", "image\tcaption\tperson\n{}\ta man, tall\t7\n"),
    "semicolons": ("a.jpg", "a.jpg", "image;caption;person\r\n{};a man, tall;7\r\n"),
    "bars": ("a.jpg", "a.jpg", "image|caption|person\n{}|a man, tall|7\n"),
    "a line that names the separator": ("a.jpg", "a.jpg", "sep=;\nimage;caption;person\n{};a man, tall;7\n"),
    "empty columns": ("a.jpg", "a.jpg", 'image,caption,person,,\n{},"a man, tall",7,,\n,,,,\n'),
    "an index in front": ("a.jpg", "a.jpg", ',image,caption,person\n0,{},"a man, tall",7\n'),
    "a mark and quotes": ("a.jpg", "a.jpg", '\ufeff"image","caption","person"\n"{}","a man, tall","7"\n'),
    "composed in the table": ("e\u0301.jpg", "\xe9.jpg", 'image,caption,person\n{},"a man, tall",7\n'),
    "decomposed in the table": ("\xe9.jpg", "e\u0301.jpg", 'image,caption,person\n{},"a man, tall",7\n'),
    "a folder with an accent": (
        "A\u030a/\uac00/1.jpg",
        "\xc5/\u1100\u1161/1.jpg",
        "image;caption;person\n{};a man, tall;7\n",
    ),
}


@pytest.mark.parametrize("how", WRITTEN)
@pytest.mark.parametrize("folder", ["", "imgs"])
def test_tables_and_names_are_read_however_they_are_written(how, folder, tmp_path, promise):
    promise("tables of any separator, names in any Unicode form")
    on_disk, in_table, text = WRITTEN[how]
    file = tmp_path / folder / on_disk
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 20)).save(file)
    (tmp_path / "captions.csv").write_text(text.format(in_table), encoding="utf8", newline="")
    split = load_split(tmp_path)
    assert split.captions == ("a man, tall",) and split.path(0) == file and file.is_file()
    assert load_person(split).tolist() == [0] and doctor(tmp_path).ok


@pytest.mark.parametrize("name", ["CUHK03", "train", "."])
@pytest.mark.parametrize("link", ["imgs", "imgs/{}"])
def test_a_link_that_leaves_is_named_with_a_root_to_use(name, link, tmp_path, promise):
    promise("bad input: data that are linked in")
    real, mine = tmp_path / "disk", tmp_path / "mine"
    (real / "imgs" / name).mkdir(parents=True)
    Image.new("RGB", (9, 20)).save(real / "imgs" / name / "a.jpg")
    place = mine / (link.format(name) if name != "." else "imgs")
    place.parent.mkdir(parents=True)
    place.symlink_to(real / place.relative_to(mine))
    records = [dict(file_path=f"{name}/a.jpg", id=1, captions=["a man"], split="train")]
    (mine / "reid_raw.json").write_text(json.dumps(records))
    with pytest.raises(UserError) as e:
        load_split(mine)
    assert f"{place} is a link" in str(e.value)
    root = str(e.value).split("use --root ")[1].split(",")[0]
    (Path(root) / "reid_raw.json").write_text(json.dumps(records))  # as the line says
    assert load_split(root).path(0).is_file()
    with pytest.raises(UserError, match=f"in train|: use --root {root}, or"):
        load_split(mine)


CONTROL = st.sampled_from(["<end_of_text>", "<START_OF_TEXT>", html.escape("<end_of_text>"), "<end_of_text"])
sentences = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40) | st.builds(
    "{} {} {}".format,
    st.text(alphabet="a man,<>_&;", max_size=9),
    CONTROL,
    st.text(alphabet="red é", max_size=9),
)


@EASY
@given(text=sentences, length=st.sampled_from([5, 8, 77]))
def test_captions_mean_what_they_say(text, length, promise):
    "No control token inside a caption; without control words open_clip's own tokens; a cut end is known."
    from open_clip import tokenize as theirs

    promise("control words are plain text, and what is cut is known")
    tokens = tokenize(text, length)
    assert (tokens == 49406).sum() == (tokens == 49407).sum() == 1
    if not has_control_words(text):
        assert torch.equal(tokens, theirs([text], length))
    unseen = unseen_text(text, length)
    assert bool(unseen) == bool(cut_captions([text], length)) == (caption_lengths([text])[0] > length)
    if unseen:
        longer = tokenize(text + " and something else", length)
        assert torch.equal(longer, tokens), "what is behind the end has no influence"


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
    for n, needed in zip(used, caption_lengths(texts)):
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
    if file.endswith((".csv", ".tsv")):
        rows, mark = [("image", "caption", "person", "split"), *FACTS], "," if file.endswith("csv") else "\t"
        return "\n".join(mark.join(map(str, r)) for r in rows)
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
        if file.endswith(".parquet"):
            pd.DataFrame(FACTS, columns=["image", "caption", "person", "split"]).to_parquet(root / file)
        else:
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


@pytest.mark.gpu
def test_a_gpu_makes_the_batches_of_a_loader(split):
    "Where it holds the pixels, or is sent them: the same bits, augmented and masked with the same keys."
    cache = PixelCache(split, (24, 10)).fill()
    how = dict(augment=AugmentConfig(mask=0.2, erase_value="mean"), seed=1, epoch=2, cache=cache)
    made, loaded = (pair_loader(split, (24, 10), 6, device=d, **how) for d in ("cuda", "cpu"))
    assert isinstance(made, PairsOn) and isinstance(
        image_loader(split, (24, 10), 5, cache=cache, device="cuda"), ImagesOn
    )
    pixels = torch.from_numpy(cache.pixels)
    sent = PairsOn(pixels, made.pairs, made.batches, "cuda")  # of a GPU without room for all of them
    for there, too, here in zip(made, sent, loaded, strict=True):
        assert {value.device.type for value in (there | too).values()} == {"cuda"}
        assert all(torch.equal(there[name].cpu(), here[name]) for name in here)
        assert all(torch.equal(too[name], there[name]) for name in here)
