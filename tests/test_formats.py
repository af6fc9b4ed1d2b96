"Every form of your own data: the same pairs are the same rows, pixels and run, whatever they are stored in."

import csv, io, json, os, shutil, tarfile

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cpcl.cli import main
from cpcl.core import UserError
from cpcl.data import load_camera, load_person, load_split
from cpcl.data.doctor import doctor
from cpcl.data.images import PixelCache, read_image
from cpcl.files import digest
from cpcl.search.build import build_index
from cpcl.train.start import data_facts, split_fingerprint

SPLITS = {"train": 12, "val": 2, "test": 4}  # images


def facts(colours=range(18)):
    "Eighteen images of nine people; each with a name, a split, one or two captions, and its pixels."
    rows, row = [], 0
    for split, images in SPLITS.items():
        for i in range(images):
            pixels = np.full((20, 8, 3), 14 * colours[row], np.uint8)
            captions = [f"person {row // 2} é, {i}", f"he walks, {row}"][: 1 + row % 2]
            name = f"{split}/{i:02} ü.png"
            who = dict(person=f"P{row // 2}", camera=f"cam {row % 3}")
            rows.append(dict(name=name, split=split, captions=captions, **who, pixels=pixels))
            row += 1
    return rows


def png(pixels):
    "The bytes of an image file."
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "PNG")
    return held.getvalue()


def put(root, name, content):
    "Write text or bytes to a file, whose folder is made."
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content.encode() if isinstance(content, str) else content)


def images(root, rows):
    for r in rows:
        put(root, r["name"], png(r["pixels"]))


def table(rows, mark=",", names=("image", "caption", "person", "split", "camera"), below=""):
    "A table with a line per caption."
    held = io.StringIO()
    lines = csv.writer(held, delimiter=mark)
    lines.writerow(names)
    for r in rows:
        for c in r["captions"]:
            cells = {k: r[k] for k in ("person", "split", "camera")} | dict(image=r["name"], caption=c)
            cells["file_name"], cells["text"] = r["name"].removeprefix(below), c
            cells["cam"] = r["camera"]
            lines.writerow([cells[n] for n in names])
    return held.getvalue()


def write_csv(root, rows):
    images(root, rows)
    put(root, "captions.csv", table(rows))


def write_semicolons(root, rows):
    images(root, rows)
    put(root, "captions.csv", ("sep=;\r\n" + table(rows, ";")).encode("utf-16"))


def write_tsv(root, rows):
    images(root, rows)
    put(root, "captions.tsv", "\ufeff" + table(rows, "\t"))


def write_lists(root, rows):
    images(root, rows)
    keys = ("split", "captions", "person", "camera")
    put(
        root,
        "captions.jsonl",
        "\n".join(json.dumps({"path": r["name"]} | {k: r[k] for k in keys}) for r in rows),
    )


def write_cells(root, rows):
    "Lists of captions as pandas writes them."
    images(root, rows)
    frame = pd.DataFrame(rows).rename(columns=dict(name="file_name")).drop(columns="pixels")
    frame.to_csv(root / "captions.csv", index=False)


def write_parquet(root, rows):
    images(root / "imgs", rows)
    frame = pd.DataFrame(rows).rename(columns=dict(name="image")).drop(columns="pixels")
    frame.to_parquet(root / "captions.parquet")


def write_metadata(root, rows):
    "An image folder of Hugging Face with one table."
    images(root, rows)
    put(root, "metadata.csv", table(rows, names=("file_name", "text", "person", "camera")))


def write_folders(root, rows):
    "An image folder of Hugging Face with a table in the folder of each split."
    for split, name in dict(train="train", val="validation", test="test").items():
        mine = [r | dict(name=r["name"].replace("val/", "validation/")) for r in rows if r["split"] == split]
        images(root, mine)
        put(
            root,
            f"{name}/metadata.csv",
            table(mine, names=("file_name", "text", "person", "cam"), below=f"{name}/"),
        )


def write_texts(root, rows):
    images(root, rows)
    for r in rows:
        put(root, r["name"].replace(".png", ".txt"), "\n".join(r["captions"]) + "\n")


def write_shards(root, rows):
    "Two shards per split, with a json or a txt."
    root.mkdir(parents=True)
    for split, n in SPLITS.items():
        mine = [r for r in rows if r["split"] == split]
        for k, part in enumerate((mine[: n // 2], mine[n // 2 :])):
            with tarfile.open(root / f"{split}-{k:06}.tar", "w") as tar:
                for r in part:
                    key = r["name"].removesuffix(".png")
                    said = json.dumps({k: r[k] for k in ("captions", "person", "camera")})
                    for kind, content in dict(png=png(r["pixels"]), json=said.encode()).items():
                        info = tarfile.TarInfo(f"{key}.{kind}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))


def write_hub(root, rows):
    "Tables of Hugging Face's hub: the bytes of the images in a column, a file per split."
    root.mkdir(parents=True)
    for split, name in dict(train="train", val="validation", test="test").items():
        mine = [r for r in rows if r["split"] == split]
        held = [dict(bytes=png(r["pixels"]), path=r["name"]) for r in mine]
        frame = pd.DataFrame(mine).drop(columns=["pixels", "name", "split"]).assign(image=held)
        frame.to_parquet(root / f"{name}-00000-of-00001.parquet", row_group_size=5)


FORMS = {f.__name__.removeprefix("write_"): f for n, f in list(globals().items()) if n.startswith("write_")}


class Rows(list):
    "A table in memory: a list of dicts."

    column_names = ["image", "captions", "person", "split", "camera"]


def in_memory(rows):
    keys = ("captions", "person", "split", "camera")
    return Rows(dict(image=Image.fromarray(r["pixels"])) | {k: r[k] for k in keys} for r in rows)


def seen(root):
    "What is read of each split: captions, a(j), people, pixels, cameras."
    found = {}
    for split in SPLITS:
        s = load_split(root, split=split)
        pixels = PixelCache(s, (20, 8)).fill().pixels
        found[split] = s.captions, s.image_of.tolist(), load_person(s), pixels, load_camera(s)
    return found


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    root = tmp_path_factory.mktemp("wanted")
    write_csv(root, facts())
    return seen(root)


def same(a, b, people=True):
    "Whether two readings are the same. A person or camera is the same if the same images share one."
    for split in SPLITS:
        (captions, rows, who, pixels, camera), other = a[split], b[split]
        assert (captions, rows) == other[:2]
        assert np.array_equal(pixels, other[3])
        if people:
            assert pd.factorize(who)[0].tolist() == pd.factorize(other[2])[0].tolist()
            assert pd.factorize(camera)[0].tolist() == pd.factorize(other[4])[0].tolist()
        else:
            assert other[2] is None and other[4] is None


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_rows(form, wanted, tmp_path, monkeypatch, promise):
    "Also in a folder with blanks and accents, given relative, and after it is written again."
    promise("forms of your own data")
    root = tmp_path / "mes données" / form
    FORMS[form](root, facts())
    same(wanted, seen(root), people=form != "texts")
    monkeypatch.chdir(tmp_path)
    assert seen(os.path.join("mes données", form))["train"][0] == wanted["train"][0]
    report = doctor(root)
    assert report.ok, str(report)
    assert [f.images for f in report.counts.values()] == list(SPLITS.values())
    before = data_facts(load_split(root))
    assert before["root"] == str(root) and data_facts(load_split(before["root"])) == before
    rows = facts()
    rows[0]["captions"] = ["another"]
    shutil.rmtree(root)
    FORMS[form](root, rows)
    assert data_facts(load_split(root))["train"] != before["train"]


def test_data_in_memory_are_the_same_rows(wanted, promise):
    promise("forms of your own data")
    same(wanted, seen(in_memory(facts())))
    by_split = {
        "validation" if s == "val" else s: in_memory([r for r in facts() if r["split"] == s]) for s in SPLITS
    }
    assert seen(by_split)["val"][0] == wanted["val"][0]
    assert doctor(by_split).ok
    train, other = load_split(in_memory(facts())), load_split(in_memory(facts(range(18)[::-1])))
    assert split_fingerprint(train) == split_fingerprint(load_split(in_memory(facts())))
    assert split_fingerprint(train) != split_fingerprint(other)  # other pixels


@pytest.mark.parametrize("form, name", [("semicolons", "captions.csv"), ("parquet", "captions.parquet")])
def test_a_table_is_given_itself(form, name, wanted, tmp_path, promise):
    promise("forms of your own data")
    FORMS[form](tmp_path / "set", facts())
    file = (tmp_path / "set" / name).rename(tmp_path / "set" / name.replace("captions", "my pairs"))
    same(wanted, seen(file))
    if form == "semicolons":  # a Parquet file of any name is found, a CSV file is not
        with pytest.raises(UserError, match="no annotation in"):
            load_split(tmp_path / "set")
    assert data_facts(load_split(file))["root"] == str(file) and doctor(file).ok


def test_shards_are_given_themselves(wanted, tmp_path, promise):
    promise("forms of your own data")
    write_shards(tmp_path / "set", facts())
    pattern = tmp_path / "set" / "test-{000000..000001}.tar"
    split = load_split(pattern, split="test")
    assert split.captions == wanted["test"][0] and load_person(split) is not None
    assert data_facts(split)["root"] == str(pattern)
    one = load_split(tmp_path / "set" / "train-000001.tar")
    assert one.images[:2] == ("train-000001.tar/train/06 ü.png", "train-000001.tar/train/07 ü.png")
    assert np.array_equal(np.asarray(read_image(one.path(1))), facts()[7]["pixels"])


def test_no_index_of_images_in_memory(tmp_path):
    with pytest.raises(UserError, match="in memory"):
        build_index(load_split(in_memory(facts())), "tiny", tmp_path / "index")


SAME = {}  # what the first form has given
SMALL = "--pretrained none --height 48 --width 24 --set labels.image.k1=6 labels.caption.k1=6"


def cpcl(words, capsys, code=0):
    "The output of a command; ~ is a blank in a word."
    assert main([w.replace("~", " ") for w in words.split()]) == code
    said = capsys.readouterr()
    return said.out + said.err


@pytest.mark.slow
@pytest.mark.parametrize("form", [*FORMS, "a table itself", "shards themselves"])
def test_every_form_trains_resumes_and_is_scored(form, tmp_path, monkeypatch, capsys, promise):
    "doctor, train, resume, eval, index and search at the command line: the same weights for every form."
    promise("forms of your own data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    root, given = tmp_path / "my set", "my~set"
    written = {"a table itself": "tsv", "shards themselves": "shards"}.get(form, form)
    FORMS[written](root, facts())
    if form == "a table itself":
        given += "/captions.tsv"
    if form == "shards themselves":
        given += "/train-{000000..000001}.tar"
    assert "problem:" not in cpcl(f"doctor {given}", capsys)
    cpcl(f"train --root {given} --out run --epochs 1 {SMALL}", capsys)
    assert SAME.setdefault("weights", digest("run/last.safetensors")) == digest("run/last.safetensors")
    cpcl(f"train --root {given} --out run --epochs 1 --resume {SMALL}", capsys)  # nothing is left to do
    split = "train" if form == "shards themselves" else "test"
    assert json.loads(cpcl(f"eval run --json --split {split}", capsys))["note"] == ""
    where = "my~set/imgs" if form == "parquet" else "my~set"
    cpcl(f"index {where} --run run --out idx", capsys)
    found = json.loads(cpcl("search idx person --json -k 3", capsys))
    assert [read_image(where.replace("~", " ") + "/" + f["path"]).size for f in found] == [(8, 20)] * 3
    rows = facts()
    rows[1]["captions"] = ["another", "caption"]
    shutil.rmtree(root)
    FORMS[written](root, rows)
    said = cpcl(f"train --root {given} --out run --epochs 1 --resume {SMALL}", capsys, code=2)
    assert "other data" in said and said.count("\n") <= 2
