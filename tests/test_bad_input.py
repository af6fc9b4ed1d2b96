"Bad input: one line that names the cause and says what to do, exit status 2, no file. Unusual input is read."

import contextlib, io, json, os, pickle, shutil, struct, tarfile, warnings, zipfile, zlib
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from cpcl.cli import main
from cpcl.data.images import read_image
from cpcl.data.read import load_split
from cpcl.encoder.towers import EncoderConfig
from cpcl.encoder.weights import load_encoder
from cpcl.data.tokens import END_OF_TEXT, token_lengths, tokenize
from cpcl.synth.dataset import write_synth

SMALL = "--pretrained none --height 48 --width 24 --epochs 1 --set labels.image.k1=6 labels.caption.k1=6"
TRAIN = f"train --root {{set}} --out {{tmp}}/out {SMALL}"
SEARCH, INDEX = "search {tmp}/index woman", "index {set}/imgs --run {run} --out {tmp}/out"


class Case(NamedTuple):
    name: str  # what is wrong
    words: str  # after `cpcl`; {set} a data set, {run} a run, {tmp} the folder of the case
    says: tuple  # what the line must contain: the cause, and what to do
    make: Callable = None  # (folder of the case) -> files made, in a copy of the data set, run or index


# --- what every case starts from, made once


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    "A data set, a trained run and an index of it, never changed afterwards."
    base = tmp_path_factory.mktemp("things")
    write_synth(base / "set", people=24, seed=11, layout="cuhk-pedes", splits=(14, 4, 6))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert main(f"train --root {base}/set --out {base}/run {SMALL}".split()) == 0, said.getvalue()
        assert main(f"index {base}/set/imgs --run {base}/run --out {base}/index".split()) == 0, (
            said.getvalue()
        )
    return base


@pytest.fixture
def quiet(monkeypatch):
    "No line of progress beside the line: on a slow machine one would appear."
    monkeypatch.setattr("cpcl.core.LINE_EVERY", float("inf"))


def prepare(case, things, tmp):
    "Copy what a case changes; returns its words with the paths filled in."
    for name in ("set", "run", "index"):
        if name in getattr(case.make, "needs", ()) or f"{{tmp}}/{name}" in case.words:
            shutil.copytree(things / name, tmp / name)
    if case.make:
        case.make(tmp)
    places = dict(
        tmp=tmp,
        set=next(p for p in (tmp / "set", things / "set") if p.exists()),
        run=things / "run",
        index=things / "index",
    )
    return [w.replace("~", " ").format(**places) for w in case.words.split(" ")]


def state(folder):
    "Every file below a folder, with a checksum of its content."

    def one(p):
        if p.is_symlink():
            return "link"
        if p.is_dir():
            return "folder"
        return zlib.crc32(p.read_bytes()) if p.is_file() else "other"

    return {str(p.relative_to(folder)): one(p) for p in sorted(folder.rglob("*"))}


def cpcl(*words):
    "(exit status, stdout, stderr and warnings) of a command that runs in this process."
    out, err = io.StringIO(), io.StringIO()
    with (
        warnings.catch_warnings(record=True) as warned,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        warnings.simplefilter("default")
        try:
            code = main(list(words))
        except SystemExit as e:
            code = e.code
    for w in warned:
        if "cpcl" in str(w.filename) or issubclass(w.category, UserWarning):
            err.write(f"{w.filename}: {w.message}\n")
    return code, out.getvalue(), err.getvalue()


# --- how files are damaged; each returns a function of the case's folder


def needing(*names):
    "Mark which things a function needs a copy of."

    def mark(f):
        f.needs = names
        return f

    return mark


def as_bytes(content):
    return content if isinstance(content, bytes) else content.encode("utf8", "surrogatepass")


def ann(change, records=False):
    "Change the annotation: `change` maps its text (or its records) to text, bytes or records."

    @needing("set")
    def make(tmp):
        file = tmp / "set" / "reid_raw.json"
        content = change(json.loads(file.read_text()) if records else file.read_text())
        if not isinstance(content, (str, bytes)):
            content = json.dumps(content)
        file.write_bytes(as_bytes(content))

    return make


def first(**changed):
    "Change fields of the first record; None removes one."

    def change(rows):
        for k, v in changed.items():
            rows[0].pop(k) if v is None else rows[0].update({k: v})
        return rows

    return ann(change, records=True)


def image(change, split="train", row=0):
    "Change one image of a split; `change` is called with its path."

    @needing("set")
    def make(tmp):
        change(load_split(tmp / "set", split=split).path(row))

    return make


def put(place, content, needs=()):
    "Write a file with that text or bytes."

    @needing(*needs)
    def make(tmp):
        (tmp / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp / place).write_bytes(as_bytes(content))

    return make


def own(text, name="captions.jsonl"):
    "An own folder with two images and that annotation, instead of the synthetic set."

    @needing()
    def make(tmp):
        (tmp / "set").mkdir()
        for n in ("a.jpg", "b.jpg"):
            Image.new("RGB", (24, 48)).save(tmp / "set" / n)
        (tmp / "set" / name).write_bytes(as_bytes(text))

    return make


def shard(files, change=lambda p: None):
    "A folder with one tar archive of these files, which is then changed."

    @needing()
    def make(tmp):
        (tmp / "set").mkdir()
        with tarfile.open(tmp / "set" / "a.tar", "w") as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        change(tmp / "set" / "a.tar")

    return make


def at(place, change):
    "Change a file of the run, the index or the set; `change` is called with its path in a copy."

    @needing(place.split("/")[0])
    def make(tmp):
        change(tmp / place)

    return make


def cut(n):
    return lambda p: p.write_bytes(p.read_bytes()[:n])


def text(t):
    return lambda p: p.write_text(t)


def gone(p):
    p.unlink()


def folder(p):
    p.unlink(missing_ok=True)
    p.mkdir()


def link(to):
    return lambda p: (p.unlink(), p.symlink_to(to))


def pipe(p):
    p.unlink()
    os.mkfifo(p)


def as_json(change):
    "Change the content of a JSON file."

    def make(p):
        p.write_text(json.dumps(change(json.loads(p.read_text()))))

    return make


def png_claims(width, height):
    "The bytes of a tiny PNG whose header claims a size."

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


class Runs:
    "An object that writes a file when it is unpickled."

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return (Path.write_text, (Path(self.place), "ran"))


@needing()
def evil(tmp):
    torch.save({"visual.conv1.weight": torch.zeros(1), "x": Runs(tmp / "RAN")}, tmp / "evil.pt")


@needing()
def evil_pickle(tmp):
    (tmp / "evil.pth").write_bytes(pickle.dumps(Runs(tmp / "RAN")))


@needing()
def evil_safetensors(tmp):
    (tmp / "evil.safetensors").write_bytes(pickle.dumps(Runs(tmp / "RAN")))


@needing()
def torchscript(tmp):
    with zipfile.ZipFile(tmp / "clip.pt", "w") as z:
        z.writestr("clip/code/__torch__.py", "raise SystemExit")
        z.writestr("clip/constants.pkl", b"\x80\x02].")


@needing()
def other_width(tmp):
    state = load_encoder(EncoderConfig("tiny", "", 48, 48)).clip.state_dict()
    torch.save({k: v[..., :64].clone() if v.ndim else v for k, v in state.items()}, tmp / "other.pt")


@needing()
def other_grid(tmp):
    torch.save(load_encoder(EncoderConfig("tiny", "", 48, 40)).clip.state_dict(), tmp / "grid.pt")


@needing()
def a_list(tmp):
    torch.save([torch.zeros(2)], tmp / "list.pt")


@needing("run")
def half_weights(tmp):
    cut(20_000)(tmp / "run" / "last.safetensors")


@needing()
def locked(tmp):
    (tmp / "locked").mkdir()
    (tmp / "locked").chmod(0o555)


LOCKED = "{tmp}/locked/out" if os.geteuid() else "/proc/version/out"  # root may write anywhere else
NESTED = "[" * 100_000


BAD = {
    "annotations": [
        Case(
            "cut in the middle",
            TRAIN,
            ("reid_raw.json", "not valid JSON", "line 1", "correct"),
            ann(lambda t: t[: len(t) // 2]),
        ),
        Case("an empty file", TRAIN, ("reid_raw.json", "not valid JSON", "correct"), ann(lambda t: b"")),
        Case(
            "an object, not a list",
            TRAIN,
            ("reid_raw.json", "must be a list", "dict"),
            ann(lambda r: {"train": r}, True),
        ),
        Case(
            "an empty list",
            TRAIN,
            ("reid_raw.json", "contains no records", "right file"),
            ann(lambda r: [], True),
        ),
        Case(
            "a record that is text",
            TRAIN,
            ("reid_raw.json", "record 0", "must be an object", "Correct"),
            ann(lambda r: ["a man", *r], True),
        ),
        Case("no split", TRAIN, ("record 0", "has no split", "Correct"), first(split=None)),
        Case("an unknown split", TRAIN, ("record 0", "'trian'", "train, val, test"), first(split="trian")),
        Case(
            "captions that are text",
            TRAIN,
            ("record 0", "captions must be a list", "Correct"),
            first(captions="a man"),
        ),
        Case("no caption", TRAIN, ("record 0", "captions must be a list", "Correct"), first(captions=[])),
        Case(
            "a caption that is a number",
            TRAIN,
            ("record 0", "a caption must be text", "12", "Correct"),
            first(captions=["a man", 12]),
        ),
        Case(
            "a caption nested deeply",
            TRAIN,
            ("reid_raw.json", "nested too deeply"),
            ann(lambda t: t.replace('"captions":["', f'"captions":[{NESTED},"', 1)),
        ),
        Case(
            "a caption that is a long list",
            TRAIN,
            ("record 0", "a caption must be text", "Correct"),
            first(captions=[["x"] * 100_000]),
        ),
        Case(
            "an empty caption",
            TRAIN,
            ("record 0", "the caption is empty", "remove it"),
            first(captions=["a man", " \t\u00a0"]),
        ),
        Case(
            "a caption with half a surrogate pair",
            TRAIN,
            ("record 0", "not valid Unicode", "Correct"),
            first(captions=["a man \ud800 " + "x" * 1_000_000]),
        ),
        Case(
            "an id that is NaN",
            TRAIN,
            ("record 0", "id must be an integer", "nan", "Correct"),
            first(id=float("nan")),
        ),
        Case(
            "an id that is text",
            TRAIN,
            ("record 0", "id must be an integer", "'7'", "Correct"),
            first(id="7"),
        ),
        Case("an id that is true", TRAIN, ("record 0", "id must be an integer", "True"), first(id=True)),
        Case("an id of 200 bits", TRAIN, ("record 0", "integer of 64 bits"), first(id=2**200)),
        Case(
            "an id of 5,000 digits",
            TRAIN,
            ("reid_raw.json", "not valid JSON", "correct"),
            ann(lambda t: t.replace('"id":', f'"id":{"9" * 5000}', 1)),
        ),
        Case(
            "a key twice",
            TRAIN,
            ("reid_raw.json", "'id'", "twice"),
            ann(lambda t: t.replace('"id":', '"id":3,"id":', 1)),
        ),
        Case(
            "an image twice",
            TRAIN,
            ("appears twice", "record 0", "keep one"),
            ann(lambda r: [r[0], *r], True),
        ),
        Case("nested deeply", TRAIN, ("reid_raw.json", "nested too deeply"), ann(lambda t: NESTED + t)),
        Case(
            "in Latin-1",
            TRAIN,
            ("reid_raw.json", "not UTF-8", "save it as UTF-8"),
            ann(lambda t: t.replace("a ", "à ", 1).encode("latin-1")),
        ),
        Case(
            "in UTF-16",
            TRAIN,
            ("reid_raw.json", "not UTF-8", "save it as UTF-8"),
            ann(lambda t: t.encode("utf-16")),
        ),
        Case(
            "a path that points outside the folder",
            TRAIN,
            ("record 0", "'../../secret.jpg'", "points outside the folder"),
            first(file_path="../../secret.jpg"),
        ),
        Case(
            "an absolute path",
            TRAIN,
            ("record 0", "'/etc/passwd'", "relative to the folder"),
            first(file_path="/etc/passwd"),
        ),
        Case(
            "a path with a NUL",
            TRAIN,
            ("record 0", "character that no file name should have", "Correct"),
            first(file_path="a\0.jpg"),
        ),
        Case(
            "a path that is a number",
            TRAIN,
            ("record 0", "must be a path, got 3", "Correct"),
            first(file_path=3),
        ),
        Case(
            "a table with other columns",
            TRAIN,
            ("captions.csv", "columns image and caption", "got photo, text", "also accepted: file_name"),
            own("photo\ttext\na.jpg\ta man\n", "captions.csv"),
        ),
        Case(
            "a table with a cell too many",
            TRAIN,
            ("captions.csv", "line 2", "more cells than columns", "quotes"),
            own("image,caption,,\na.jpg,a man,,tall\n", "captions.csv"),
        ),
        Case(
            "a name in capitals",
            TRAIN,
            ("1 of the 1 images", "(A.JPG)", "there is a.jpg", "names must be equal"),
            own("image;caption\nA.JPG;a man\n", "captions.csv"),
        ),
        Case(
            "two files of one name",
            TRAIN,
            ("two names differ only in the Unicode form", "rename one"),
            lambda tmp: (
                own("image,caption\n\xe9.jpg,a man\n", "captions.csv")(tmp),
                [Image.new("RGB", (24, 48)).save(tmp / "set" / f"{n}.jpg") for n in ("\xe9", "e\u0301")],
            ),
        ),
        Case(
            "no train split",
            TRAIN,
            ("has no train split", "only"),
            ann(lambda r: [x | {"split": "test"} for x in r], True),
        ),
        Case(
            "no annotation",
            "train --root {tmp}/bare --out {tmp}/out",
            (
                "no annotation in",
                "reid_raw.json",
                "captions.csv",
                "metadata.csv",
                "image,caption / 0001.jpg,a man",
            ),
            put("bare/readme.txt", "hello"),
        ),
        Case(
            "one folder too high",
            "train --root {tmp} --out {tmp}/out",
            ("no annotation in", "did you mean", "set"),
            at("set/reid_raw.json", lambda p: None),
        ),
        Case(
            "annotations of two data sets",
            TRAIN,
            ("annotations of cuhk-pedes and rstpreid", "choose one"),
            at("set/data_captions.json", text("[]")),
        ),
        Case(
            "the name of another data set",
            TRAIN + " --data rstpreid",
            ("no annotation in", "data_captions.json"),
        ),
        Case(
            "a folder that does not exist",
            TRAIN.replace("{set}", "{tmp}/nowhere"),
            ("no such folder", "nowhere"),
        ),
        Case(
            "a folder that is a file",
            TRAIN.replace("{set}", "{set}/reid_raw.json"),
            ("reid_raw.json is a file, and none of .csv", "give the folder"),
        ),
        Case(
            "a table that is not there",
            TRAIN.replace("{set}", "{tmp}/captions.csv"),
            ("no such folder", "captions.csv"),
        ),
        Case(
            "own: a Parquet file that is none",
            TRAIN,
            ("captions.parquet is no intact Parquet file", "get it again"),
            own("image,caption\na.jpg,a man\n", "captions.parquet"),
        ),
        Case(
            "own: in Latin-1",
            TRAIN,
            ("captions.csv is not UTF-8", "save it as UTF-8", "reads as cp1252: 'a.jpg,ein Mädchen'"),
            own("image,caption\na.jpg,ein Mädchen\n".encode("latin-1"), "captions.csv"),
        ),
        Case(
            "own: an empty table",
            TRAIN,
            ("captions.tsv", "contains no records"),
            own("image\tcaption\n", "captions.tsv"),
        ),
        Case(
            "own: an image without a text",
            TRAIN,
            ("1 images", "have no text (b.jpg)", "write x.txt beside x.jpg"),
            own("a man", "a.txt"),
        ),
        Case(
            "own: a text without an image",
            TRAIN,
            ("1 texts", "have no image (c.txt)", "copy the images there"),
            lambda tmp: [own("a man", "a.txt")(tmp), put("set/b.txt", "x")(tmp), put("set/c.txt", "x")(tmp)],
        ),
        Case(
            "own: a tar cut in the middle",
            TRAIN,
            ("a.tar is no intact tar archive", "get it again"),
            shard({"a.jpg": b"x" * 999, "a.txt": b"a man"}, cut(700)),
        ),
        Case(
            "own: a sample without a caption",
            TRAIN,
            ("a.tar, sample a: no caption", "a line in a .txt"),
            shard({"a.jpg": b"x"}),
        ),
        Case(
            "shards of which some are missing",
            TRAIN.replace("{set}", "{set}/a-{{0..2}}.tar"),
            ("3 of 3 shards are missing", "a-0.tar"),
        ),
        Case(
            "own: a truncated line",
            TRAIN,
            ("captions.jsonl", "not valid JSON", "line 2", "correct"),
            own('{"image": "a.jpg", "caption": "a man"}\n{"image": "b.jpg", "capt'),
        ),
        Case(
            "own: no caption column",
            TRAIN,
            ("captions.csv", "image and caption", "got image, words", "caption"),
            own("image,words\na.jpg,a man\n", "captions.csv"),
        ),
        Case(
            "own: a comma without quotes",
            TRAIN,
            ("captions.csv", "line 2", '"quotes"'),
            own("image,caption\na.jpg,a man, walking\n", "captions.csv"),
        ),
        Case(
            "own: a column twice",
            TRAIN,
            ("captions.csv", "column appears twice", "caption"),
            own("image,caption,caption\na.jpg,x,y\n", "captions.csv"),
        ),
        Case(
            "own: a split in some rows only",
            TRAIN,
            ("captions.jsonl", "give all or none"),
            own('{"image": "a.jpg", "caption": "x", "split": "train"}\n{"image": "b.jpg", "caption": "y"}'),
        ),
        Case(
            "own: no person, supervised",
            TRAIN + " --preset supervised",
            ("supervised", "people"),
            own('{"image": "a.jpg", "caption": "x"}\n{"image": "b.jpg", "caption": "y"}'),
        ),
    ],
    "images": [
        Case("an empty file", TRAIN, ("cannot read the image", ".jpg", "remove it"), image(cut(0))),
        Case("cut in the middle", TRAIN, ("cannot read the image", ".jpg", "remove it"), image(cut(700))),
        Case(
            "cut in the middle, of the test split",
            TRAIN,
            ("cannot read the image", ".jpg", "remove it"),
            image(cut(700), "test", -1),
        ),
        Case(
            "text named like an image",
            TRAIN,
            ("cannot read the image", ".jpg", "remove it"),
            image(text("<html>404</html>")),
        ),
        Case(
            "PostScript, which would be run",
            TRAIN,
            ("cannot read the image", ".jpg", "remove it"),
            image(text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")),
        ),
        Case(
            "a bomb of 400 million pixels",
            TRAIN,
            ("more than 80,000,000", ".jpg", "make it smaller"),
            image(lambda p: p.write_bytes(png_claims(20_000, 20_000))),
        ),
        Case(
            "a bomb of 121 million pixels",
            TRAIN,
            ("more than 80,000,000", ".jpg", "make it smaller"),
            image(lambda p: p.write_bytes(png_claims(11_000, 11_000))),
        ),
        Case(
            "a header of 2**31 pixels a side",
            TRAIN,
            ("more than 80,000,000", ".jpg", "make it smaller"),
            image(lambda p: p.write_bytes(png_claims(2**31 - 1, 2**31 - 1))),
        ),
        Case("a missing image", TRAIN, ("1 of the", "are missing in", "imgs", ".jpg"), image(gone)),
        Case("all images missing", TRAIN, ("are missing in", "imgs", ", ..."), at("set/imgs", shutil.rmtree)),
        Case("a folder named like an image", TRAIN, ("are missing in", ".jpg"), image(folder)),
        Case("a pipe, which would block", TRAIN, ("are missing in", ".jpg"), image(pipe)),
        Case(
            "a link out of the folder",
            TRAIN,
            ("is a link that points outside", ".jpg", "copy"),
            image(link("/etc/passwd")),
        ),
        Case("a link to itself", TRAIN, ("are missing in", ".jpg"), image(lambda p: link(p)(p))),
        Case(
            "a folder of images that is a link to elsewhere",
            TRAIN,
            ("imgs is a link that points outside", "elsewhere and use --root", "copy it there"),
            at(
                "set/imgs",
                lambda p: (
                    p.rename(p.parent.parent / "elsewhere"),
                    p.symlink_to(p.parent.parent / "elsewhere"),
                ),
            ),
        ),
        Case(
            "scored: cut in the middle",
            "eval {run} --root {set}",
            ("cannot read the image", ".jpg", "remove it"),
            image(cut(700), "test"),
        ),
        Case(
            "a photograph of an iPhone",
            TRAIN,
            ("cannot read the image", ".jpg", "a HEIC photograph", "cpcl[heic]", "convert it to JPEG"),
            image(lambda p: p.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 200)),
        ),
        Case(
            "a web page",
            TRAIN,
            ("cannot read the image", ".jpg", "a web page", "get the file again"),
            image(text("\ufeff  <!DOCTYPE HTML><title>404</title>")),
        ),
        Case(
            "a pointer of Git LFS",
            TRAIN,
            ("cannot read the image", ".jpg", "git lfs pull"),
            image(text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n")),
        ),
        Case(
            "the answer of a server",
            TRAIN,
            ("cannot read the image", ".jpg", "JSON text", "get the file again"),
            image(text('{"error": "rate limit"}')),
        ),
        Case(
            "a drawing", TRAIN, ("cannot read the image", "an SVG drawing", "PNG"), image(text("<svg></svg>"))
        ),
        Case(
            "a document",
            TRAIN,
            ("cannot read the image", "a PDF", "save it as JPEG"),
            image(text("%PDF-1.7\n")),
        ),
        Case(
            "a film",
            TRAIN,
            ("cannot read the image", "a film"),
            image(lambda p: p.write_bytes(b"\0\0\0\x18ftypisom" + b"\0" * 99)),
        ),
        Case(
            "indexed: none that can be read",
            "index {tmp}/crops --run {run} --out {tmp}/out",
            ("none of the 2 images", "crops", "can be read"),
            lambda tmp: [put(f"crops/{n}.jpg", "x")(tmp) for n in "ab"],
        ),
        Case(
            "searched with: cut in the middle",
            "search {index} --image {tmp}/x.jpg",
            ("cannot read the image", "x.jpg"),
            put("x.jpg", b"\xff\xd8\xff"),
        ),
        Case(
            "searched with: a file that does not exist",
            "search {index} --image {tmp}/nowhere.jpg",
            ("cannot read the image", "nowhere.jpg"),
        ),
    ],
    "configurations": [
        Case("an unknown key", TRAIN + " hcm.tua=1", ("no setting 'tua'", "tau_p")),
        Case("an unknown group", TRAIN + " losses.tau=1", ("no setting 'losses.tau'", "hcm", "optim")),
        Case("a group for a key", TRAIN + " hcm=1", ("hcm is a group", "hcm.NAME=VALUE")),
        Case("a setting without a value", TRAIN + " hcm.tau_p", ("NAME=VALUE", "'hcm.tau_p'")),
        Case("a word for a number", TRAIN + " optim.epochs=three", ("optim.epochs", "'three'")),
        Case("half an epoch", TRAIN + " optim.epochs=1.5", ("optim.epochs", "1.5")),
        Case("words for a pair of numbers", TRAIN + " augment.erase_area=a,b", ("erase_area", "a,b")),
        Case("a negative batch", TRAIN + " --batch-size -4", ("--batch-size", "2 or more", "-4")),
        Case("a batch of one", TRAIN + " --batch-size 1", ("--batch-size", "2 or more", "1")),
        Case("a batch of one, by its setting", TRAIN + " optim.batch_size=1", ("at least 2", "a pair needs")),
        Case("a learning rate of NaN", TRAIN + " optim.lr=nan", ("optim.lr", "above 0", "nan")),
        Case("an infinite learning rate", TRAIN + " optim.lr=inf", ("optim.lr", "above 0", "inf")),
        Case(
            "eps of 1",
            TRAIN + " labels.image.eps=1",
            ("eps", "between 0 and 1", "Jaccard distance of strangers is 1", "got 1.0"),
        ),
        Case("k1 above the images", TRAIN + " labels.image.k1=5000", ("labels.image.k1 is 5000", "images")),
        Case("a momentum of 2", TRAIN + " memory.mu=2", ("memory.mu", "0..1", "2")),
        Case(
            "a warm-up longer than the run", TRAIN + " optim.warmup=9", ("optim.warmup", "0..epochs=1", "9")
        ),
        Case(
            "neither true nor false",
            TRAIN + " memory.refresh=perhaps",
            ("refresh", "true or false", "'perhaps'"),
        ),
        Case("a seed below 0", TRAIN + " --seed -1", ("--seed", "0..4294967295", "-1")),
        Case(
            "workers below 0",
            TRAIN + " --workers -1",
            ("--workers", "0 or more", "-1"),
        ),
        Case("workers in words", TRAIN + " --workers many", ("--workers", "auto", "many")),
        Case(
            "a size that another kind of model does not take",
            TRAIN + " --model coca_ViT-B-32",
            ("48x24", "no multiple of coca_ViT-B-32's patch of 32", "give --height 64 --width 32"),
        ),
        Case(
            "a model to be fetched",
            TRAIN + " --model hf-hub:laion/CLIP-ViT-B-32",
            ("hf-hub:laion/CLIP-ViT-B-32", "nothing is fetched", "--pretrained"),
        ),
        Case("a size that no patch divides", TRAIN + " --height 50", ("50x24", "multiple", "patch of 8")),
        Case(
            "a height without a width",
            "train --root {set} --out {tmp}/out --height 48",
            ("height and width both", "48x0"),
        ),
        Case("an unknown model", TRAIN + " --model ViT-B-61", ("no model 'ViT-B-61'", "ViT-B-16")),
        Case(
            "a model without weights",
            "train --root {set} --out {tmp}/out --model ViT-B-16",
            ("--pretrained", "openai"),
        ),
        Case(
            "a data set without its folder",
            "train --data rstpreid --out {tmp}/out",
            ("--data rstpreid", "--root"),
        ),
        Case(
            "an unknown preset",
            TRAIN + " --preset cpcll",
            ("--preset", "'cpcll'", "'cluster-contrast'", "cpcl train --help"),
        ),
        Case(
            "an unknown flag",
            TRAIN + " --epoch 3",
            ("--epoch", "did you mean --epochs?", "cpcl train --help"),
        ),
        Case(
            "another command's flag",
            TRAIN + " --shots 2 3",
            ("--shots", "belongs to cpcl synth", "cpcl train --help"),
        ),
        Case(
            "a flag of the wrong type",
            TRAIN + " --lr quick",
            ("--lr must be a number", "'quick'", "cpcl train --help"),
        ),
        Case("a flag without its value", TRAIN + " --root", ("--root", "Missing value", "cpcl train --help")),
        Case(
            "a word missing",
            "search",
            ("Missing from cpcl search", "folder of the index", "cpcl search --help"),
        ),
        Case("an unknown command", "trian --root {set}", ("trian", "train, eval, settings", "cpcl --help")),
        Case(
            "a long word that no command takes",
            "doctor {set} " + "x" * 300,
            ("x" * 300, "cpcl doctor --help"),
        ),
        Case("drawn: too few people", "synth {tmp}/out --people 2", ("--people must be 3 or more", "got 2")),
        Case(
            "drawn: more shots than cameras",
            "synth {tmp}/out --people 9 --shots 4 99",
            ("shots", "<=", "cameras", "99"),
        ),
        Case(
            "drawn: into a folder with other files",
            "synth {tmp} --people 9",
            ("is not empty", "thesis.tex", "empty folder"),
            put("thesis.tex", "five years"),
        ),
        Case("an ablation that does not exist", "ablate 99_nothing", ("no notebook 99_nothing",)),
    ],
    "weights": [
        Case(
            "cut in the middle",
            TRAIN + " --pretrained {tmp}/run/last.safetensors",
            ("last.safetensors", "not a complete safetensors file"),
            half_weights,
        ),
        Case(
            "an empty file",
            TRAIN + " --pretrained {tmp}/x.safetensors",
            ("x.safetensors", "not a complete safetensors file"),
            put("x.safetensors", b""),
        ),
        Case(
            "text",
            TRAIN + " --pretrained {tmp}/x.pt",
            ("x.pt", "not a plain file of weights", "nothing in it was run"),
            put("x.pt", "weights"),
        ),
        Case(
            "a pickle with code in it",
            TRAIN + " --pretrained {tmp}/evil.pt",
            ("evil.pt", "not a plain file of weights", "nothing in it was run"),
            evil,
        ),
        Case(
            "a bare pickle with code in it",
            TRAIN + " --pretrained {tmp}/evil.pth",
            ("evil.pth", "not a plain file of weights", "nothing in it was run"),
            evil_pickle,
        ),
        Case(
            "a pickle named like safetensors",
            TRAIN + " --pretrained {tmp}/evil.safetensors",
            ("evil.safetensors", "not a complete safetensors file"),
            evil_safetensors,
        ),
        Case(
            "a TorchScript program",
            TRAIN + " --pretrained {tmp}/clip.pt",
            ("clip.pt", "cpcl convert", "use what it writes"),
            torchscript,
        ),
        Case(
            "of another width",
            TRAIN + " --pretrained {tmp}/other.pt",
            ("other.pt", "does not fit tiny", "table of positions", "37x64"),
            other_width,
        ),
        Case(
            "of a grid that nothing tells",
            TRAIN + " --pretrained {tmp}/grid.pt",
            ("grid.pt", "30 positions are no square"),
            other_grid,
        ),
        Case(
            "a list of tensors", TRAIN + " --pretrained {tmp}/list.pt", ("list.pt", "no state dict"), a_list
        ),
        Case("neither file nor tag", TRAIN + " --pretrained opnai", ("no file and no tag 'opnai'", "tags")),
        Case("a folder", TRAIN + " --pretrained {set}", ("no file and no tag", "tags")),
        Case(
            "scored: cut in the middle",
            "eval {tmp}/run --root {set}",
            ("last.safetensors", "not a complete safetensors file"),
            half_weights,
        ),
        Case(
            "scored: a pickle with code in it",
            "eval {tmp}/run --root {set}",
            ("last.safetensors", "not a complete safetensors file"),
            lambda tmp: (evil_pickle(tmp), (tmp / "evil.pth").replace(tmp / "run" / "last.safetensors")),
        ),
        Case(
            "exported: cut in the middle",
            "export {tmp}/run --out {tmp}/out",
            ("last.safetensors", "not a complete safetensors file"),
            half_weights,
        ),
        Case(
            "converted: text",
            "convert {tmp}/x.pt",
            ("x.pt", "no TorchScript", "nothing in it was run"),
            put("x.pt", "weights"),
        ),
        Case(
            "converted: a pickle with code in it",
            "convert {tmp}/evil.pt",
            ("evil.pt", "no TorchScript", "nothing in it was run"),
            evil,
        ),
        Case(
            "converted: a file that does not exist",
            "convert {tmp}/nowhere.pt",
            ("no such file", "nowhere.pt"),
        ),
    ],
    "runs": [
        Case(
            "of another version",
            "eval {tmp}/run --root {set}",
            ("config.json", "no setting 'warp'", "another version"),
            at("run/config.json", as_json(lambda c: c | {"config": c["config"] | {"warp": 9}})),
        ),
        Case(
            "a configuration cut off",
            "eval {tmp}/run --root {set}",
            ("run/config.json",),
            at("run/config.json", cut(40)),
        ),
        Case(
            "a configuration of another kind",
            "eval {tmp}/run --root {set}",
            ("run/config.json",),
            at("run/config.json", text("[1, 2]")),
        ),
        Case(
            "a configuration of wrong types",
            "eval {tmp}/run --root {set}",
            ("run/config.json",),
            at("run/config.json", as_json(lambda c: c | {"config": c["config"] | {"optim": 3}})),
        ),
        Case(
            "no configuration",
            "eval {tmp}/run --root {set}",
            ("no config.json", "run"),
            at("run/config.json", gone),
        ),
        Case("a device", "eval {run} --root {set} --device tpu", ("tpu", "there is: cpu")),
        Case(
            "a model that is nothing",
            "eval --model {tmp}/nowhere --root {set}",
            ("nowhere", "is not a run folder, a published model or a file"),
        ),
        Case(
            "two sizes",
            "eval --model tiny --size 48x24 --height 48 --width 24 --root {set}",
            ("--size or --height and --width, not both",),
        ),
        Case("a file", "eval {set}/reid_raw.json --root {set}", ("reid_raw.json", "not a run folder")),
        Case(
            "a folder that does not exist", "eval {tmp}/nowhere --root {set}", ("nowhere", "not a run folder")
        ),
        Case(
            "no finished epoch",
            "eval {tmp}/run --root {set}",
            ("no last.safetensors", "no epoch is complete"),
            at("run/last.safetensors", gone),
        ),
        Case(
            "scored on a split that does not exist",
            "eval {run} --root {set} --split val",
            ("has no val split", "only"),
            ann(lambda r: [x for x in r if x["split"] != "val"], True),
        ),
        Case(
            "exported: a result cut off",
            "export {tmp}/run --out {tmp}/out",
            ("result.json", "damaged"),
            at("run/result.json", cut(20)),
        ),
        Case(
            "exported: a folder that does not exist",
            "export {tmp}/nowhere --out {tmp}/out",
            ("nowhere", "not a run folder"),
        ),
        Case(
            "exported: below a file",
            "export {run} --out {tmp}/file/out",
            ("file", "is no folder", "another --out"),
            put("file", "x"),
        ),
        Case(
            "started where a run is",
            TRAIN.replace("{tmp}/out", "{tmp}/run"),
            ("holds a run already", "--resume", "--out"),
        ),
        Case(
            "started in a folder with other files",
            TRAIN.replace("{tmp}/out", "{tmp}/full"),
            ("is not empty", "thesis.tex", "--out"),
            put("full/thesis.tex", "five years"),
        ),
        Case(
            "started at a file", TRAIN.replace("{tmp}/out", "{tmp}/file"), ("file", "--out"), put("file", "x")
        ),
        Case(
            "started below a file",
            TRAIN.replace("{tmp}/out", "{tmp}/file/out"),
            ("file", "another --out"),
            put("file", "x"),
        ),
        Case(
            "started where writing is not allowed",
            TRAIN.replace("{tmp}/out", LOCKED),
            (LOCKED.replace("{tmp}", ""), "another --out"),
            locked,
        ),
        Case(
            "resumed with other settings",
            TRAIN.replace("{tmp}/out", "{tmp}/run") + " memory.mu=.5 --resume",
            ("other settings", "memory.mu was 0.1, now 0.5"),
        ),
        Case(
            "resumed from another version's",
            TRAIN.replace("{tmp}/out", "{tmp}/run") + " --resume",
            ("config.json", "no setting 'warp'", "another version"),
            at("run/config.json", as_json(lambda c: c | {"config": c["config"] | {"warp": 9}})),
        ),
    ],
    "indexes": [
        Case(
            "an empty folder",
            "search {tmp}/none woman",
            ("holds no index", "cpcl index"),
            lambda tmp: (tmp / "none").mkdir(),
        ),
        Case("a file", "search {tmp}/file woman", ("file", "holds no index", "cpcl index"), put("file", "x")),
        Case(
            "a manifest cut off",
            SEARCH,
            ("manifest.json", "damaged", "build the index again"),
            at("index/manifest.json", cut(30)),
        ),
        Case(
            "a manifest that is a list",
            SEARCH,
            ("manifest.json", "damaged", "build the index again"),
            at("index/manifest.json", text("[]")),
        ),
        Case(
            "a manifest that is not text",
            SEARCH,
            ("manifest.json", "damaged", "build the index again"),
            at("index/manifest.json", lambda p: p.write_bytes(b"\xff\xfe\0")),
        ),
        Case(
            "a manifest without its files",
            SEARCH,
            ("manifest.json", "damaged (files is missing)", "build the index again"),
            at("index/manifest.json", as_json(lambda m: {k: v for k, v in m.items() if k != "files"})),
        ),
        Case(
            "a manifest that names files elsewhere",
            SEARCH,
            ("manifest.json", "damaged", "build the index again"),
            at(
                "index/manifest.json",
                as_json(
                    lambda m: (
                        m
                        | {
                            "files": {
                                "vectors": {"file": "../../x", "sha256": ""},
                                "rows": {"file": "/etc/passwd", "sha256": ""},
                            }
                        }
                    )
                ),
            ),
        ),
        Case(
            "of another version",
            SEARCH,
            ("format 99", "build it again"),
            at("index/manifest.json", as_json(lambda m: m | {"format": 99})),
        ),
        Case(
            "vectors cut off",
            SEARCH,
            ("vectors-", "missing or damaged", "build the index again"),
            at("index", lambda p: cut(99)(next(p.glob("vectors-*")))),
        ),
        Case(
            "rows missing",
            SEARCH,
            ("rows-", "missing or damaged", "build the index again"),
            at("index", lambda p: next(p.glob("rows-*")).unlink()),
        ),
        Case(
            "its run moved",
            "search {index} woman --run {tmp}/nowhere",
            ("nowhere", "not a run folder", "--run"),
        ),
        Case(
            "its run trained again",
            "search {index} woman --run {tmp}/run",
            ("other weights", "build the index again"),
            at("run/last.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-4] + b"\0\0\0\1")),
        ),
        Case("no query", "search {index}", ("nothing to search for", "a sentence")),
        Case("a blank query", "search {index} ~", ("must be a sentence", "empty")),
        Case("a query that is too long", "search {index} " + "x" * 3000, ("2000 characters", "3000")),
        Case("a list of length 0", "search {index} woman -k 0", ("k must be", "1 or more")),
        Case(
            "a filter on an unknown column",
            "search {index} woman --where hour=3",
            ("no column 'hour'", "none"),
        ),
        Case("a filter without a value", "search {index} woman --where hour", ("column=value", "'hour'")),
        Case(
            "built from a folder that does not exist",
            "index {tmp}/nowhere --run {run} --out {tmp}/out",
            ("nowhere", "not a folder"),
        ),
        Case(
            "built from a folder without images",
            "index {tmp}/bare --run {run} --out {tmp}/out",
            ("bare", "no image", ".jpg"),
            put("bare/a.txt", "x"),
        ),
        Case(
            "built with no run",
            "index {set}/imgs --run {tmp}/nowhere --out {tmp}/out",
            ("nowhere", "not a run folder"),
        ),
        Case(
            "built with no encoder",
            "index {set}/imgs --out {tmp}/out",
            ("which encoder?", "--run", "--model tiny"),
        ),
        Case(
            "built with two encoders", INDEX + " --model tiny", ("--run or --model, not both", "of its own")
        ),
        Case(
            "built with a model that is nothing",
            "index {set}/imgs --model {tmp}/nowhere --out {tmp}/out",
            ("nowhere", "is not a run folder, a published model or a file", "check the path"),
        ),
        Case(
            "built with a model without weights",
            "index {set}/imgs --model ViT-B-16 --out {tmp}/out",
            ("--model ViT-B-16 needs --pretrained", "openai"),
        ),
        Case(
            "built with a file that is no model",
            "index {set}/imgs --model {tmp}/w.pt --out {tmp}/out",
            ("w.pt", "does not say which model it holds", "--pretrained"),
            put("w.pt", b"PK"),
        ),
        Case(
            "built at an impossible size",
            "index {set}/imgs --model tiny --size 50x24 --out {tmp}/out",
            ("50x24", "the nearest is 48x24"),
        ),
        Case(
            "built at a size in words",
            "index {set}/imgs --model tiny --size small --out {tmp}/out",
            ("--size must be HEIGHTxWIDTH", "'small'"),
        ),
        Case(
            "built with a table that does not exist",
            INDEX + " --columns {tmp}/nowhere.csv",
            ("cannot read", "nowhere.csv"),
        ),
        Case(
            "built with a table without paths",
            INDEX + " --columns {tmp}/t.csv",
            ("t.csv", "column `path`", "camera"),
            put("t.csv", "file,camera\na.jpg,1\n"),
        ),
        Case(
            "built with a table that is not text",
            INDEX + " --columns {tmp}/t.csv",
            ("t.csv", "not UTF-8", "save it as UTF-8"),
            put("t.csv", b"path,camera\n\xff\xfe\0,\x81\n"),
        ),
        Case(
            "built with a table of too many cells",
            INDEX + " --columns {tmp}/t.csv",
            ("cannot read the table", "t.csv", "CSV"),
            put("t.csv", "path,camera\ncam_0/a.jpg,1,2\n"),
        ),
        Case(
            "built with a table of other images",
            INDEX + " --columns {tmp}/t.csv",
            ("names none of the images", "relative to"),
            put("t.csv", "path,camera\nelsewhere.jpg,1\n"),
        ),
        Case("built on an unknown kind of store", INDEX + " --store redis:x", ("milvus:URI", "'redis:x'")),
        Case("built with no thread", INDEX + " --workers 0", ("workers must be 1 or more", "0")),
        Case("shown on an impossible port", "app {index} --port 70000", ("--port", "0..65535", "70000")),
        Case(
            "built below a file",
            "index {tmp}/crops --run {run} --out {tmp}/file/out",
            ("file", "give another --out"),
            lambda tmp: (
                put("file", "x")(tmp),
                (tmp / "crops").mkdir(),
                Image.new("RGB", (24, 48)).save(tmp / "crops" / "a.jpg"),
            ),
        ),
    ],
}
CASES = [
    pytest.param(group, case, id=f"{group}: {case.name}") for group, cases in BAD.items() for case in cases
]


@pytest.mark.slow
def test_every_name_of_a_model_is_built_or_refused_in_one_line(monkeypatch, promise):
    "All names that open_clip lists, and names that it would fetch, without a hub: nothing asks the network."
    import open_clip, socket

    from cpcl.core import UserError
    from cpcl.encoder.towers import Encoder

    def asked(*args, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", asked)
    monkeypatch.setattr("cpcl.encoder.fetching.hub_answers", lambda: False)
    strange = [
        "hf-hub:laion/CLIP-ViT-B-32",
        "local-dir:/tmp",
        "timm/ViT-B-16",
        "",
        "\x1b[2J",
        "../x",
        "TINY",
        "x" * 9999,
    ]
    names = [*open_clip.list_models(), *strange]
    promise("every model name is built, or refused in one line", cases=len(names))
    built = 0
    for name in names:
        vision = (open_clip.get_model_config(name) or {}).get("vision_cfg", {}) if name not in strange else {}
        patch = vision.get("patch_size")
        size = (16 * patch, 8 * patch) if isinstance(patch, int) else (384, 128)
        try:
            with torch.device("meta"):
                encoder = Encoder(name, size).eval()
                words = torch.ones(2, 12, dtype=torch.long)
                image, text = encoder(torch.zeros(2, 3, *size), words)
            assert image.shape == text.shape == (2, encoder.width)
            built += 1
        except UserError as e:
            assert "\n" not in str(e) and len(str(e)) < 500 and str(e).isprintable()
    assert 30 <= built < len(names)


def test_without_a_hub_nobody_waits(monkeypatch):
    "The hub's client would pause for half a minute and more, and say so in many lines, before the one line."
    import importlib.util, time

    from cpcl.core import UserError
    from cpcl.encoder import EncoderConfig, fetching
    from cpcl.encoder.weights import fetch
    from cpcl.encoder.words import words_of

    class Deaf:
        def head(self, url, timeout):
            raise ConnectionError("nobody is there")

    waited = []
    monkeypatch.setattr("huggingface_hub.utils.get_session", Deaf)
    monkeypatch.setitem(fetching._last, "asked", float("-inf"))
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(UserError, match="could not fetch ViT-B-16 / openai"):
        fetch(EncoderConfig("ViT-B-16", "openai"))
    if importlib.util.find_spec("transformers"):
        with pytest.raises(UserError, match="tokenizer of timm/ViT-B-16-SigLIP2-256"):
            words_of("ViT-B-16-SigLIP2-256")
    assert not waited


@pytest.mark.parametrize("group, case", CASES)
def test_bad_input_is_one_line(group, case, things, tmp_path, monkeypatch, quiet, promise):
    promise(f"bad input: {group}")
    monkeypatch.chdir(tmp_path)
    words = prepare(case, things, tmp_path)
    before = state(tmp_path)
    code, out, err = cpcl(*words)
    assert code == 2, (code, out, err)
    assert err.startswith("cpcl: ") and err.endswith("\n"), err
    assert err.count("\n") == 1 and len(err) < 2100, err
    assert "Traceback" not in err + out
    for part in case.says:
        assert part in err, f"{part!r} not in {err}"
    assert state(tmp_path) == before, "something was written"


BAD_DATA = [c for c in CASES if c.values[1].words == TRAIN and c.values[1].make]  # only the set is changed


@pytest.mark.parametrize("group, case", BAD_DATA)
def test_the_doctor_reports_it(group, case, things, tmp_path, promise):
    "The doctor finds beforehand what would stop a training: a report, exit status 1, nothing on stderr."
    promise("bad input: the doctor")
    prepare(case, things, tmp_path)
    before = state(tmp_path)
    code, out, err = cpcl("doctor", str(tmp_path / "set"))
    assert err == "" and "Traceback" not in out and state(tmp_path) == before, err
    if case.name == "no train split":
        assert code == 0 and "note: no train split" in out
    else:
        assert code == 1 and "problem: " in out and all(part in out for part in case.says), out


# --- unusual input that is accepted, and read correctly

PERSON = np.zeros((60, 24, 3), np.uint8)
PERSON[:30] = (200, 30, 40)
PERSON[30:] = (30, 50, 190)
PERSON[28:32] = (20, 170, 60)
UPRIGHT = Image.fromarray(PERSON)  # red above, blue below, a green belt


def turned(tag, how):
    "Save the person turned, as a camera stores it, with the EXIF tag that says so."

    def save(p):
        exif = Image.Exif()
        exif[274] = tag
        UPRIGHT.transpose(how).save(p, "JPEG", exif=exif, quality=95)

    return save


def sixteen(p):
    Image.fromarray(PERSON.mean(2).astype(np.uint16) * 257).save(p)


def alpha(p):
    rgba = UPRIGHT.convert("RGBA")
    rgba.putalpha(
        Image.fromarray(np.where(np.arange(60)[:, None] < 30, 255, 0).astype(np.uint8).repeat(24, 1))
    )
    rgba.save(p)


def animated(p):
    UPRIGHT.quantize(16).save(
        p,
        save_all=True,
        append_images=[Image.new("RGB", UPRIGHT.size, "white").quantize(16)] * 3,
        duration=40,
    )


def moving(p):
    UPRIGHT.save(
        p,
        save_all=True,
        lossless=True,
        append_images=[Image.new("RGB", UPRIGHT.size, "white")] * 3,
        duration=40,
    )


def strange_exif(p):
    UPRIGHT.save(p, "JPEG", exif=b"Exif\0\0broken", quality=95)


GREY = np.repeat(PERSON.mean(2).astype(np.uint8)[..., None], 3, 2)
WHITE_BELOW = np.where(np.arange(60)[:, None, None] < 30, PERSON, 255).astype(np.uint8)
PICTURES = {  # name -> (file, how it is saved, the pixels that must be read)
    "plain": ("a.png", UPRIGHT.save, PERSON),
    "CMYK, as for print": ("a.jpg", lambda p: UPRIGHT.convert("CMYK").save(p, quality=95), PERSON),
    "CMYK in a TIFF": ("a.tif", lambda p: UPRIGHT.convert("CMYK").save(p), PERSON),
    "16 bits of grey": ("a.png", sixteen, GREY),
    "16 bits in a TIFF": ("a.tif", sixteen, GREY),
    "half of it transparent": ("a.png", alpha, WHITE_BELOW),
    "a palette": ("a.png", lambda p: UPRIGHT.quantize(16).save(p), PERSON),
    "an animation (GIF)": ("a.gif", animated, PERSON),
    "an animation (WebP)": ("a.webp", moving, PERSON),
    "stored lying on its side": ("a.jpg", turned(6, Image.Transpose.ROTATE_90), PERSON),
    "stored on its other side": ("a.jpg", turned(8, Image.Transpose.ROTATE_270), PERSON),
    "stored upside down": ("a.jpg", turned(3, Image.Transpose.ROTATE_180), PERSON),
    "stored as in a mirror": ("a.jpg", turned(2, Image.Transpose.FLIP_LEFT_RIGHT), PERSON),
    "a damaged EXIF block": ("a.jpg", strange_exif, PERSON),
    "a PNG by the name of a JPEG": ("a.jpg", lambda p: UPRIGHT.save(p, "PNG"), PERSON),
    "one pixel": (
        "a.png",
        lambda p: Image.new("RGB", (1, 1), (9, 8, 7)).save(p),
        np.full((1, 1, 3), (9, 8, 7)),
    ),
    "30,000 pixels wide, one high": (
        "a.png",
        lambda p: Image.new("RGB", (30_000, 1), (9, 8, 7)).save(p),
        np.full((1, 30_000, 3), (9, 8, 7)),
    ),
    "a name in three scripts": ("写真 фото 🙂.png", UPRIGHT.save, PERSON),
}
CAPTIONS = {
    "emoji": "👩🏽‍🦰 in a red 🧥, walking 🚶‍♀️",
    "right to left": "امرأة ترتدي معطفا أحمر \u202eאישה במעיל",
    "Chinese": "一位穿红色外套的女士",
    "only punctuation": "?!... --- ()",
    "a million characters": "a woman in a red coat and " * 40_000,
    "one word of a million letters": "x" * 1_000_000,
    "the end token written out": "a woman <end_of_text> in a red coat <start_of_text>",
    "control characters and line breaks": "a woman\r\n\tin a\x00 red\x1b[31m coat\u2028",
    "marks upon marks": "a wo" + "\u0301" * 500 + "man",
    "HTML": "a &amp;lt;b&gt;woman</b> in a <script>alert(1)</script> coat",
}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return load_encoder(EncoderConfig("tiny", "", 48, 24))


def unit_rows(x):
    return np.isfinite(x).all() and np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-4)


@pytest.mark.parametrize("name", PICTURES)
def test_strange_images_are_read_rightly(name, tmp_path, encoder, promise):
    promise("strange but right: images")
    file, save, want = PICTURES[name]
    save(tmp_path / file)
    (tmp_path / "captions.jsonl").write_text(
        json.dumps({"image": file, "caption": "a woman"}), encoding="utf8"
    )
    split = load_split(tmp_path)
    got = read_image(split.path(0))
    assert (got.mode, got.size) == ("RGB", want.shape[1::-1])
    above, below = slice(None, len(want) * 2 // 5 or 1), slice(len(want) * 3 // 5, None)  # the belt
    for part in (above, below):
        colour = np.asarray(got, float)[part].mean((0, 1))
        assert np.abs(colour - want[part].mean((0, 1))).max() < 6
    x = encoder.embed_images([split.path(0)])
    assert x.shape == (1, encoder.width) and unit_rows(x)
    if want is PERSON:
        assert float((x @ encoder.embed_images([UPRIGHT]).T)[0, 0]) > 0.98  # the same person to the encoder


@pytest.mark.parametrize("name", CAPTIONS)
def test_strange_captions_are_read_rightly(name, tmp_path, encoder, promise):
    promise("strange but right: captions")
    UPRIGHT.save(tmp_path / "a.png")
    (tmp_path / "captions.jsonl").write_text(
        json.dumps({"image": "a.png", "caption": CAPTIONS[name]}), encoding="utf8"
    )
    split = load_split(tmp_path)
    assert split.captions == (CAPTIONS[name],)
    tokens = tokenize(split.captions)
    used = int(token_lengths(tokens)[0])
    assert tokens.shape == (1, 77) and 3 <= used <= 77 and tokens[0, used - 1] == END_OF_TEXT
    if "million" in name:
        assert used == 77
    else:
        assert not tokens[0, used:].any() or "<" in CAPTIONS[name]
    assert unit_rows(encoder.embed_texts(split.captions))


@pytest.mark.slow
def test_strange_input_from_end_to_end(tmp_path, monkeypatch, quiet, promise):
    "All of it in one data set: checked, trained on, scored, indexed, searched."
    promise("strange but right: commands", cases=5)
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "set"
    rows = []
    for i, (name, (file, save, _)) in enumerate(PICTURES.items()):
        (root / f"{i}").mkdir(parents=True)
        save(root / f"{i}" / file)
        for text in (list(CAPTIONS.values())[i % len(CAPTIONS)], f"a man in a {name}"):
            rows.append({"image": f"{i}/{file}", "caption": text, "more": {"deep": [[[{}]]]}})
    (root / "captions.jsonl").write_bytes(
        b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, rows)).encode()
    )  # a byte order mark, Windows' line ends

    def run(*words):
        code, out, err = cpcl(*words)
        assert (code, err) == (0, ""), (code, out, err)
        return out

    assert "all well" in run("doctor", str(root))
    assert "run folder" in run(*TRAIN.format(set=root, tmp=tmp_path).split(" "))
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["last"]["queries"] == len(rows) and 0 <= result["last"]["R1"] <= 100
    scores = json.loads(run("eval", "out", "--split", "train", "--json"))
    assert {"text to image", "image to text"} < set(scores)
    assert (scores["root"], scores["split"], scores["captions"]) == (str(root), "train", len(rows))
    (root / "torn.jpg").write_bytes(b"\xff\xd8")
    printed = run("index", str(root), "--run", "out", "--out", "index")
    assert f"{len(PICTURES)} images indexed" in printed and "1 unreadable" in printed
    found = json.loads(run("search", "index", CAPTIONS["emoji"], "-k", "99", "--json"))
    assert {r["path"] for r in found} == {r["image"] for r in rows}
    assert all(np.isfinite(r["score"]) for r in found)


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        main(["train", "--root", str(tmp_path / "nowhere"), "--debug"])


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    "An unexpected exception is not turned into one line."

    def broken(*args, **more):
        raise RuntimeError("a bug")

    monkeypatch.setattr("cpcl.synth.dataset.write_synth", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["synth", str(tmp_path / "s")])
