"Galleries that were moved, linked, rewritten or oddly named, and indexes that somebody damaged or made up."

import io, json, os, shutil, subprocess, sys, threading, warnings
from dataclasses import replace
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from cpcl.cli import main
from cpcl.core import UserError, unit
from cpcl.encoder import EncoderConfig, load_encoder, save_encoder
from cpcl.files import digest
from cpcl.search import Index
from cpcl.search.build import build_index, open_store
from cpcl.search.columns import with_columns
from cpcl.search.gallery import image_file, list_images, read_found, scan_images
from cpcl.search.manifest import Manifest, StoredFile, is_index, publish, read_manifest
from cpcl.search.milvus import MilvusStore, connect
from cpcl.search.store import LocalStore, read_store
from cpcl.train import make_config
from cpcl.train.start import start_run

QUICK = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(QUICK, max_examples=5000)


def crop(file, shade):
    "A small image, whose grey tells which one it is."
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 40), (shade, 90, 200 - shade)).save(file)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run folder with an untrained encoder."
    run = tmp_path_factory.mktemp("run") / "run"
    start_run(run, make_config("clip"), {})
    save_encoder(load_encoder(EncoderConfig(pretrained="", height=48, width=24)), run / "last.safetensors")
    return run


@pytest.fixture
def crops(tmp_path):
    "A gallery of twelve images below two cameras."
    for i in range(12):
        crop(tmp_path / "crops" / f"cam_{i % 2}" / f"{i:02d}.jpg", 15 * i)
    return tmp_path / "crops"


@pytest.fixture
def build(run, crops, tmp_path):
    "build(folder, out, ...) -> (the index, the lines it reported)."

    def build(folder=crops, out=tmp_path / "idx", **how):
        lines = []
        return Index.build(folder, run, out, log=lines.append, **how), lines

    return build


def cpcl(capsys, *words):
    "(exit status, output, errors) of a command."
    capsys.readouterr()
    status = main([str(w) for w in words])
    return status, *capsys.readouterr()


def contents(folder):
    "Every file below a folder that is not our mark, with its content."
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".cpcl"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


# --- what a listing leaves out


def _closed(path):
    "A path, if its folder may be listed."
    if str(path).endswith("lost+found"):
        raise PermissionError(13, "Permission denied", str(path))
    return path


def test_what_is_left_out_is_counted(tmp_path, crops, promise):
    promise("what a listing of images leaves out is counted by its reason", 9)
    for i in range(11):
        crop(tmp_path / "disk" / "cam9" / f"{i}.jpg", i)
    crop(tmp_path / "disk" / "one.jpg", 1)
    (crops / "cam9").symlink_to(tmp_path / "disk" / "cam9")
    (crops / "one.jpg").symlink_to(tmp_path / "disk" / "one.jpg")
    (crops / "unmounted").symlink_to(tmp_path / "nowhere")
    (crops / "inside").symlink_to("cam_0")
    (crops / "loop").symlink_to("loop")
    for name in ("a.heic", "b.HEIC", "c.tga", "list.txt", "none", "Thumbs.db"):
        (crops / name).write_bytes(b"x")
    crop(crops / ".thumbs" / "1.jpg", 1)
    crop(crops / ".hidden.jpg", 1)
    (crops / ".DS_Store").write_bytes(b"x")
    found, left = scan_images(crops)
    assert len(found) == 12
    (crops / "lost+found").mkdir()
    listing = os.scandir
    with mock.patch("os.scandir", lambda p: listing(_closed(p))):
        assert "1 folders that may not be read (lost+found)" in scan_images(crops)[1].line()
    assert (left.links, left.formats.total(), left.formats[".heic"], left.hidden) == (13, 6, 2, 2)
    assert (
        "13 behind links (e.g. cam9), 6 of other formats (.heic 2" in left.line()
        and "2 hidden" in left.line()
    )


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".JPG", ".avif", ".jp2", ".webp", ".ppm"])
def test_suffixes_that_can_be_read_are_listed(suffix, crops, promise):
    promise("a suffix that belongs to a readable format is listed")
    picture = Image.open(crops / "cam_0" / "00.jpg")
    kind = {".jfif": "JPEG", ".jpe": "JPEG", ".JPG": "JPEG", ".jp2": "JPEG2000"}.get(suffix, suffix[1:])
    try:
        picture.save(crops / f"x{suffix}", kind.upper())
    except (KeyError, OSError):
        pytest.skip("this Pillow cannot write it")
    assert f"x{suffix}" in set(list_images(crops).path)


def test_a_gallery_of_links_says_what_to_index(tmp_path, crops, promise):
    promise("a gallery that holds links only names what can be indexed instead", 2)
    links = tmp_path / "links"
    links.mkdir()
    for link in ("cam9", "cam8"):
        (links / link).symlink_to(crops / "cam_0")
        with pytest.raises(UserError, match=f"only links out of it.*index {crops.resolve()}/cam_0 itself"):
            list_images(links)


def test_names_that_cannot_be_stored_are_left_out_before_encoding(build, crops, promise, monkeypatch):
    bad = [b"caf\xe9.jpg", b"tab\t.jpg", b"esc\x1b[31m.jpg", b"line\n.jpg", b"del\x7f.jpg"]
    for name in bad:
        shutil.copy(crops / "cam_0" / "00.jpg", os.path.join(os.fsencode(crops), name))
    os.mkdir(os.path.join(os.fsencode(crops), b"d\xe9p"))
    shutil.copy(crops / "cam_0" / "00.jpg", os.path.join(os.fsencode(crops), b"d\xe9p", b"1.jpg"))
    promise("a file name that cannot be stored is left out and reported", len(bad) + 1)
    index, lines = build()
    assert len(index) == 12 and "6 with names that cannot be stored" in lines[0]
    assert all(line.isprintable() for line in lines)
    assert not any(lost in " ".join(index.rows.path) for lost in ("caf", "tab", "esc", "line", "del"))


def test_unreadable_files_are_named_and_changed_ones_counted(build, crops, promise):
    promise("an index names its unreadable files and tells changed from dropped ones", 4)
    for i in range(7):
        (crops / f"broken{i}.jpg").write_bytes(b"x" * i)
    _, lines = build()
    assert "12 encoded, 0 kept, 0 dropped, 7 unreadable (broken0.jpg, broken1.jpg, " in lines[-1]
    assert "broken4.jpg, ...)" in lines[-1] and "broken5" not in lines[-1]
    for file in (crops / "cam_0").iterdir():
        os.utime(file, ns=(1, 1))
    assert "6 encoded (6 changed), 6 kept, 0 dropped, 7 unreadable" in build()[1][-1]
    (crops / "cam_0" / "00.jpg").unlink()
    (crops / "cam_0" / "02.jpg").write_bytes(b"torn")
    assert "0 encoded, 10 kept, 2 dropped, 8 unreadable" in build()[1][-1]


# --- an index's folder


def test_only_files_of_older_generations_are_deleted(build, crops, tmp_path, promise):
    promise("an index deletes only what its own manifests name", 3)
    build()
    idx = tmp_path / "idx"
    mine = {"vectors-mine.faiss": "a", "rows-0123456789ab.parquet": "b", "vectors-0123456789ab.faiss": "c"}
    for name, text in mine.items():
        (idx / name).write_text(text)
    for i in range(3):
        crop(crops / f"new{i}.jpg", i)
        build()
    held = contents(idx)
    assert {name: held.pop(name).decode() for name in mine} == mine
    assert len(held) == 5  # the manifest and two generations


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", '{"format": 2}', "\ud800", "", '{"format": 99}', "[" * 100_000]
)
def test_a_damaged_manifest_in_our_folder_is_made_again(text, build, tmp_path, promise):
    promise("an index whose manifest is damaged is made again, and a strange folder with such a file is not")
    index, _ = build()
    manifest = tmp_path / "idx" / "manifest.json"
    manifest.write_bytes(text.encode("utf8", "surrogatepass"))
    assert len(build()[0]) == len(index)
    manifest.write_bytes(text.encode("utf8", "surrogatepass"))
    (tmp_path / "idx" / ".cpcl").unlink()
    before = contents(tmp_path / "idx")
    with pytest.raises(UserError, match="was not made by `cpcl index`"):
        build()
    assert contents(tmp_path / "idx") == before


def test_an_index_of_another_format_is_recognised(build, tmp_path, promise):
    promise("an index from before folders had marks is recognised by its manifest", 2)
    build()
    manifest = tmp_path / "idx" / "manifest.json"
    for change in ({}, {"format": 1}):
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
        (tmp_path / "idx" / ".cpcl").unlink()
        assert is_index(tmp_path / "idx") and len(build()[0]) == 12


WRITER = """
import sys
import numpy as np, pandas as pd
from cpcl.search.manifest import Manifest
from cpcl.search.store import LocalStore
folder, generations = sys.argv[1], int(sys.argv[2])
for g in range(generations):
    paths = [f"{i:03d}.jpg" for i in range(300)]
    rows = pd.DataFrame(dict(path=paths, size=1, mtime_ns=g, made=str(g)))
    x = np.zeros((300, 16), np.float32)
    x[:, g % 16] = 1
    store = LocalStore()
    store.add(rows, x)
    store.finish(rows, None)
    of = dict(folder="/c", run="/r", weights="1", model="m", width=16, unreadable=[])
    about = Manifest(columns={"made": [str(g)]}, **of)
    store.write(folder, about)
    print(g, flush=True)
"""


def test_an_index_opens_while_it_is_written_again(tmp_path, promise):
    promise("an index can be opened at any moment while it is written again", 300)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path / "idx", "150"], stdout=subprocess.PIPE)
    writer.stdout.readline()
    threading.Thread(target=writer.stdout.read, daemon=True).start()  # so that the writer never waits
    opened, seen = 0, set()
    while writer.poll() is None or opened < 300:
        manifest, store = open_store(tmp_path / "idx")
        (generation,) = manifest.columns["made"]
        assert set(store.rows.made) == {generation}
        assert (store.take(store.rows.path)[:, int(generation) % 16] == 1).all()
        opened += 1
        seen.add(generation)
    assert writer.returncode == 0 and len(seen) > 20, (opened, len(seen))


# --- moved and replaced images


def copied_with(change):
    "How a gallery comes to another place: by a copy, and something that happens to its files."

    def move(old, new):
        shutil.copytree(old, new, copy_function=shutil.copy2)
        shutil.rmtree(old)
        for file in new.rglob("*.jpg"):
            seen = file.stat().st_mtime_ns
            os.utime(file, ns=(seen, change(seen)))

    return move


MOVES = {
    "renamed": lambda old, new: old.rename(new),
    "whole seconds": copied_with(lambda ns: ns // 10**9 * 10**9),
    "two seconds": copied_with(lambda ns: ns // (2 * 10**9) * 2 * 10**9),
    "microseconds": copied_with(lambda ns: ns // 1000 * 1000),
    "copied, other times": lambda old, new: shutil.copytree(old, new, copy_function=shutil.copyfile),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_moved_gallery_keeps_its_vectors(move, build, crops, tmp_path, promise, monkeypatch):
    promise("a gallery that was moved or copied is not encoded again")
    for i, file in enumerate(sorted(crops.rglob("*.jpg"))):
        os.utime(file, ns=(1, 1_763_700_001_123_456_789 + i))
    index, _ = build()
    MOVES[move](crops, tmp_path / "new")
    monkeypatch.setattr("cpcl.search.source.Source.load", lambda *_: pytest.fail("the model was loaded"))
    moved, lines = build(tmp_path / "new")
    assert "0 encoded, 12 kept, 0 dropped" in lines[-1] and "12 vectors are used again" in lines[-2]
    assert moved.manifest.folder == str((tmp_path / "new").resolve())
    assert (moved.store.take(moved.rows.path) == index.store.take(index.rows.path)).all()
    assert "0 encoded, 12 kept" in build(tmp_path / "new")[1][-1]


def test_another_gallery_is_not_taken_for_a_moved_one(build, crops, tmp_path, promise):
    promise("images that only have the names and sizes of indexed ones are encoded", 2)
    for i in range(12):  # an uncompressed format: every file has the same size, and an archive's time
        for folder, shade in (("a", i), ("b", 100 + i)):
            crop(tmp_path / folder / f"{i}.ppm", shade)
            os.utime(tmp_path / folder / f"{i}.ppm", (1, 1))
    build(tmp_path / "a")
    assert "12 encoded, 0 kept" in build(tmp_path / "b")[1][-1]
    assert "12 encoded, 0 kept" in build(crops)[1][-1]


def test_a_moved_gallery_says_so(build, crops, tmp_path, promise, capsys):
    promise("a gallery that is not there any more is reported, and its new place can be given", 8)
    index, _ = build()
    found, new = index.search("a man", k=3), crops.rename(tmp_path / "new")
    idx = tmp_path / "idx"
    says = f"the images are not at {crops.resolve()} any more"
    with pytest.raises(UserError, match=says):
        index.show(found)
    box = index.explore()
    box.children[0].children[0].value = "a woman"
    assert says in box.children[2].value and "--folder" in box.children[2].value
    assert says in cpcl(capsys, "search", idx, "a man")[2]
    status, out, err = cpcl(capsys, "search", idx, "a man", "--folder", new)
    assert (status, err) == (0, "") and "cam_" in out
    box = Index.open(idx, folder=new).explore()
    box.children[0].children[0].value = "a woman"
    assert box.children[2].value.startswith("12 images")
    assert len(box.children[3].children[0].children) == 12
    status, _, err = cpcl(capsys, "search", idx, "a man", "--folder", tmp_path / "nowhere")
    assert status == 2 and "is not a folder" in err
    crops.mkdir()  # where the disk was mounted
    assert says in cpcl(capsys, "search", idx, "a man")[2] and says in read_found(crops, found.path)[1]


SECRETS = ["link", "folder link", "hard path", "dots", "dots that come back", "chain", "null"]


@pytest.mark.parametrize("how", SECRETS)
def test_no_file_outside_the_folder_is_shown(how, crops, tmp_path, promise):
    promise("an image that became a link, or a row that leaves the folder, is not shown")
    crop(tmp_path / "secret" / "me.jpg", 200)
    secret = tmp_path / "secret" / "me.jpg"
    (crops / "link.jpg").symlink_to(secret)
    (crops / "folder").symlink_to(tmp_path / "secret")
    (crops / "chain.jpg").symlink_to(crops / "link.jpg")
    path = {
        "link": "link.jpg",
        "folder link": "folder/me.jpg",
        "hard path": str(secret),
        "dots": "../secret/me.jpg",
        "dots that come back": "cam_0/../../secret/me.jpg",
        "chain": "chain.jpg",
        "null": "cam_0/00.jpg\0",
    }[how]
    with pytest.raises(UserError):
        image_file(crops, path)
    pictures, note = read_found(crops, ["cam_0/00.jpg", path])
    assert pictures[0] and pictures[1] is None and "1 of 2 images cannot be shown" in note


def test_a_replaced_image_is_shown_nowhere(build, crops, tmp_path, promise):
    promise("an image that became a link, or a row that leaves the folder, is not shown", 3)
    index, _ = build()
    crop(tmp_path / "secret.png", 255)
    victim = crops / "cam_0" / "00.jpg"
    victim.unlink()
    victim.symlink_to(tmp_path / "secret.png")
    found = index.search("a man", k=12)
    with pytest.warns(UserWarning, match="1 of 12 images cannot be shown"):
        axes = index.show(found)
    shown = [im.get_array() for ax in axes.flat for im in ax.images]
    assert not any((np.asarray(a)[..., 0] > 250).all() for a in shown)
    box = index.explore()
    box.children[0].children[0].value = "a man"
    assert len(box.children[3].children[0].children) == 11 and "1 of 12" in box.children[2].value
    assert "11 kept, 1 dropped" in build()[1][-1]  # the link is not indexed either


IN_A_FORK = """
import multiprocessing, sys
from cpcl.search import Index

def ask(sentence):
    return index.search(sentence, 3).path.tolist()

index = Index.open(sys.argv[1])
index.search(["a man in a red coat"] * 64)
with multiprocessing.get_context("fork").Pool(2) as pool:
    found = pool.map_async(ask, ["a man", "a woman"]).get(60)
assert found == [ask("a man"), ask("a woman")], found
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_search_in_a_forked_process_answers(build, tmp_path, promise):
    "Torch and faiss have lost their threads there, and would wait for them forever."
    promise("a search in a forked process answers", 2)
    build(out=tmp_path / "index")
    subprocess.run([sys.executable, "-c", IN_A_FORK, str(tmp_path / "index")], check=True, timeout=200)


def test_an_empty_list_is_drawn(build, promise, recwarn):
    promise("a search that finds nothing draws that and says which value no row has", 3)
    index, _ = build(columns=pd.DataFrame({"path": ["cam_0/00.jpg"], "floor": [2]}))
    for where in ({"floor": 9}, {"floor": [7, 8]}, {"floor": []}):
        found = index.search("a man", where=where)
        (ax,) = index.show(found).flat
        assert [t.get_text() for t in ax.texts] == ["nothing found"]
        wanted = [f"no row has floor={9}; there are '', 2"] if where == {"floor": 9} else found.attrs["notes"]
        assert found.attrs["notes"] == wanted


# --- tables and filters


def gaps():
    "A column of whole numbers with a gap, as pandas makes it."
    frame = pd.DataFrame({"path": [f"cam_{i % 2}/{i:02d}.jpg" for i in range(12)]})
    frame["floor"] = [1, 2, np.nan] * 4
    frame["indoors"] = [True, False] * 6
    frame["day"] = pd.to_datetime(["2026-01-31 00:00", "2026-02-01 08:00", None] * 4)
    frame["guard"] = ["ann", None, "bob"] * 4
    return frame


VALUES = {
    "a number of the frame": ("floor", gaps().floor.iloc[1], 4),
    "an integer": ("floor", 2, 4),
    "NumPy's integer": ("floor", np.int64(2), 4),
    "a float": ("floor", 2.0, 4),
    "a text": ("floor", "2", 4),
    "the text of a float": ("floor", "2.0", 4),
    "NumPy's bool": ("indoors", gaps().indoors.iloc[0], 6),
    "a bool": ("indoors", True, 6),
    "a time of the frame": ("day", gaps().day.iloc[1], 4),
    "a date": ("day", gaps().day.iloc[0].date(), 4),
    "the text of a date": ("day", "2026-01-31", 4),
    "None": ("guard", None, 4),
    "NaN": ("floor", np.nan, 4),
    "NaT": ("day", pd.NaT, 4),
    "a list": ("floor", [1, 2], 8),
    "a series": ("floor", gaps().floor, 12),
    "an array": ("floor", np.array([1, 2]), 8),
    "a set": ("guard", {"ann"}, 4),
    "an array of one": ("floor", np.array(2), 4),
}


@pytest.fixture(scope="module")
def tabled(run, tmp_path_factory):
    "An index with columns of every type, in files and on a server."
    base = tmp_path_factory.mktemp("tabled")
    for i in range(12):
        crop(base / "crops" / f"cam_{i % 2}" / f"{i:02d}.jpg", 15 * i)
    stores = {"files": "", "server": f"milvus:{base / 'g.db'}"}
    return {
        name: Index.build(base / "crops", run, base / name, gaps(), store=store, log=lambda line: None)
        for name, store in stores.items()
    }


@pytest.mark.parametrize("value", VALUES)
def test_a_filter_takes_any_value(value, tabled, promise):
    promise("a filter takes a value of any type and finds its rows")
    column, wanted, count = VALUES[value]
    for index in tabled.values():
        found = index.search("a man", k=99, where={column: wanted})
        assert (len(found), found.attrs["notes"]) == (count, [])


def test_a_filter_that_makes_no_sense_is_one_line(tabled, promise):
    wrong = {"floor": {"a": 1}, "day": [[1]], "hour": 3, "guard": object}
    promise("a filter that makes no sense is one line", 2 * len(wrong) + 2)
    for index in tabled.values():
        for column, value in wrong.items():
            with pytest.raises(UserError):
                index.search("a man", where={column: value})
        with pytest.raises(UserError, match="where must be a dict"):
            index.search("a man", where="floor=2")


def test_rows_of_a_table_that_join_nothing_are_counted(crops, tmp_path, promise):
    promise("a table joins by the rules of an annotation, and what does not join is counted", 4)
    table = tmp_path / "t.csv"
    table.write_text(
        "path, camera ,\n./cam_0/00.jpg, 1,\ncam_1/01.jpg ,1,\ncam_0\\02.jpg,1,\nimgs/03.jpg,1,\n"
    )
    lines = []
    joined = with_columns(list_images(crops), table, crops, lines.append)
    assert joined.camera.tolist().count("1") == 3 and set(joined) == {"path", "size", "mtime_ns", "camera"}
    assert lines == ["3 of 4 rows of the table name an image, e.g. 'imgs/03.jpg', and 9 images have no row"]


@pytest.mark.parametrize("text", ["\0", "\ud800", "x" * 5000])
def test_what_a_table_brings_can_be_read_again(text, build, tmp_path, promise):
    promise("an index with any table can be opened, or the table is refused")
    table = pd.DataFrame({"path": ["cam_0/00.jpg"], "note": pd.Series([text], dtype=object)})
    try:
        index, _ = build(columns=table)
    except UserError as e:
        assert "the column 'note'" in str(e) and len(text) == 1
        return
    assert len(Index.open(tmp_path / "idx").search("a man", where={"note": text})) == len(index) - 11


# --- the command


def test_json_is_valid_json(build, capsys, tmp_path, promise, monkeypatch):
    promise("cpcl search --json prints JSON that every reader accepts", 2)
    build(columns=pd.DataFrame({"path": ["cam_0/00.jpg"], "floor": [np.nan]}))
    honest = Index.search

    def with_nan(self, *args, **kwargs):
        found = honest(self, *args, **kwargs)
        found.loc[0, "score"] = np.nan
        return found

    monkeypatch.setattr(Index, "search", with_nan)
    status, out, _ = cpcl(capsys, "search", tmp_path / "idx", "a man", "--json")

    def refuse(word):
        raise AssertionError(word)

    rows = json.loads(out, parse_constant=refuse)
    assert status == 0 and rows[0]["score"] is None and rows[1]["floor"] == ""


def test_filters_add_up_and_names_are_printed_safely(build, capsys, tmp_path, promise):
    promise("--where may be given again, and names are printed without control characters", 3)
    index, _ = build(columns=gaps())
    for words, count in (
        (["floor=1", "--where", "floor=2"], 8),
        (["floor=1", "indoors=True"], 2),
        (["day="], 4),
    ):
        status, out, _ = cpcl(
            capsys, "search", tmp_path / "idx", "a man", "-k", 99, "--json", "--where", *words
        )
        assert (status, len(json.loads(out))) == (0, count)
    rows = index.rows.assign(guard="\x1b]0;owned\x07\n")
    index.store.finish(rows, None)
    index.store.write(tmp_path / "idx", replace(index.manifest, columns=dict.fromkeys(index.columns)))
    status, out, _ = cpcl(capsys, "search", tmp_path / "idx", "a man", "-k", 3)
    assert status == 0 and "\x1b" not in out and out.count("\n") == 4


def test_what_a_query_loses_is_reported(build, capsys, tmp_path, promise):
    promise("what CLIP does not read of a query is reported", 3)
    index, _ = build()
    long = "a man with a red coat " * 15 + "and a GREEN hat"
    _, _, err = cpcl(capsys, "search", tmp_path / "idx", long)
    assert "only the first 77 tokens of a query count, not seen: " in err and "GREEN hat" in err
    _, out, err = cpcl(capsys, "search", tmp_path / "idx", "a man <end_of_text> in red", "--json")
    assert "read as plain text" in err and len(json.loads(out)) == 10
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        index.search(long)
    assert len(warned) == 1 and "GREEN" not in str(warned[0].message)  # a log has no queries in it


def test_paths_of_a_user_are_expanded(run, crops, tmp_path, monkeypatch, promise):
    promise("~ is expanded in every path of an index", 6)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, tmp_path / "run")
    gaps().to_csv(tmp_path / "t.csv", index=False)
    build_index("~/crops", "~/run", "~/idx", "~/t.csv", log=lambda line: None)
    index = Index.open("~/idx", run="~/run", folder="~/crops")
    assert len(index.search(image="~/crops/cam_0/00.jpg", k=3)) == 3
    build_index("~/crops", "~/run", "~/served", store="milvus:~/g.db", log=lambda line: None)
    assert (tmp_path / "g.db").exists() and not (tmp_path / "~").exists()
    for bad in ("~nobody_of_that_name/x", "a\0b", b"caf\xe9"):
        with pytest.raises(UserError):
            Index.open(bad)


# --- servers


def test_no_secret_is_written_or_printed(crops, run, tmp_path, capsys, monkeypatch, promise):
    secret = "hunter2"
    addresses = [
        f"http://root:{secret}@127.0.0.1:9",
        f"https://{secret}longer@host",
        f"http://h?token={secret}",
    ]
    promise("no password of a Milvus server is written or printed", 2 * len(addresses) + 1)
    for address in addresses:
        for store in (f"milvus:{address}", address):
            words = ["index", crops, "--run", run, "--out", tmp_path / "idx", "--store", store]
            status, out, err = cpcl(capsys, *words)
            assert status == 2 and secret not in out + err and "Traceback" not in err, err
    assert not (tmp_path / "idx").exists()
    monkeypatch.setenv("CPCL_MILVUS_TOKEN", f"root:{secret}")
    broken = RuntimeError(f"cannot log in as root:{secret} ({secret})")
    monkeypatch.setattr("pymilvus.MilvusClient", lambda *args, **kwargs: (_ for _ in ()).throw(broken))
    with pytest.raises(UserError) as e:
        connect("http://127.0.0.1:19530")
    assert secret not in str(e.value) and "cannot log in" in str(e.value)


def test_an_error_of_a_server_is_one_line(tmp_path, promise):
    from pymilvus.exceptions import MilvusException

    promise("an error of a Milvus server is one line", 4)
    store = MilvusStore(str(tmp_path / "g.db"), "people")
    rows = pd.DataFrame(dict(path=["a"], size=1, mtime_ns=1))
    store.add(rows, np.eye(1, 8, dtype=np.float32))
    asks = {
        "search": lambda: store.nearest(np.eye(1, 8, dtype=np.float32), 1, {}),
        "get": lambda: store.has("a"),
        "upsert": lambda: store.add(rows, np.eye(1, 8, dtype=np.float32)),
        "delete": lambda: store.finish(rows[:0], None),
    }
    for name, ask in asks.items():
        with pytest.MonkeyPatch.context() as patch:
            gone = MilvusException(message="server is gone\nmore")
            patch.setattr(store.client._client, name, lambda *a, **k: (_ for _ in ()).throw(gone))
            with pytest.raises(UserError, match="failed: .*server is gone") as e:
                ask()
            assert "\n" not in str(e.value)
    store.client.close()


# --- manifests and tables that somebody damaged or made up


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    "A sound index of twenty rows with its manifest, to be damaged in copies."
    folder = tmp_path_factory.mktemp("sound")
    x = unit(np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32))
    paths = [f"cam_{i % 3}/{i:02d}.jpg" for i in range(20)]
    rows = pd.DataFrame(dict(path=paths, size=1, mtime_ns=2, camera=[str(i % 3) for i in range(20)]))
    store = LocalStore()
    store.add(rows, x)
    store.finish(rows, None)
    about = Manifest(
        folder="/c",
        run="/r",
        weights="1",
        model="m",
        width=8,
        columns={"camera": ["0", "1", "2"]},
        unreadable=[],
    )
    return folder, store.write(folder, about)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["\ud800", "..", "a/b", "\0"]),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw, value):
    "A JSON value with something in it replaced, removed or added, at any depth."
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value)))
        rest = {k: v for k, v in value.items() if k != key}
        return rest if not draw(st.integers(0, 4)) else rest | {key: draw(changed(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        i = draw(st.integers(0, len(value) - 1))
        return [*value[:i], draw(changed(value[i])), *value[i + 1 :]]
    return draw(anything)


def usable(folder):
    "Open an index: it can be asked, or one line says what is wrong."
    try:
        manifest = read_manifest(folder)
        assert isinstance(manifest.width, int) and all(isinstance(c, str) for c in manifest.columns)
        if manifest.store:
            return
        store = read_store(folder, manifest)
    except UserError as e:
        assert str(e) and "\n" not in str(e), str(e)
        return
    q = np.eye(1, manifest.width, dtype=np.float32)
    for column in manifest.columns:
        store.has_value(column, "1")
        store.nearest(q, 3, {column: ["1"]})
    (found,) = store.nearest(q, 5, {})
    assert len(found) == min(5, len(store)) and all(isinstance(p, str) for p in found.path)


def damaged_manifest(sound, tmp_path_factory, data):
    folder, manifest = sound
    copy = tmp_path_factory.getbasetemp() / "damaged manifest"
    copy.mkdir(exist_ok=True)
    for stored in manifest.files.values():
        if not (copy / stored.file).exists():
            shutil.copy(folder / stored.file, copy)
    good = json.loads((folder / "manifest.json").read_text())
    text = json.dumps(data.draw(changed(good)))
    raw = text.encode("utf8", "surrogatepass")
    if not data.draw(st.integers(0, 4)):
        at = data.draw(st.integers(0, len(raw)))
        raw = raw[:at] + data.draw(st.binary(max_size=4)) + raw[at + data.draw(st.integers(0, 3)) :]
    (copy / "manifest.json").write_bytes(raw)
    usable(copy)


def damaged_rows(sound, tmp_path_factory, data):
    folder, manifest = sound
    copy = tmp_path_factory.getbasetemp() / "damaged rows"
    copy.mkdir(exist_ok=True)
    raw = bytearray((folder / manifest.files["rows"].file).read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    if not data.draw(st.integers(0, 4)):
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    published(copy, manifest, folder, bytes(raw))
    usable(copy)


def published(copy, manifest, folder, rows):
    "An index with other rows, whose checksum is right."
    vectors = manifest.files["vectors"]
    if not (copy / vectors.file).exists():
        shutil.copy(folder / vectors.file, copy)
    (copy / "rows.parquet").write_bytes(rows)
    files = {"vectors": vectors, "rows": StoredFile("rows.parquet", digest(copy / "rows.parquet"))}
    publish(copy, replace(manifest, files=files))


cells = (
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=3) | st.binary(max_size=3)
)


def made_up_rows(sound, tmp_path_factory, data):
    folder, manifest = sound
    copy = tmp_path_factory.getbasetemp() / "made up rows"
    copy.mkdir(exist_ok=True)
    names = data.draw(st.lists(st.sampled_from(["path", "size", "mtime_ns", "camera", "x"]), unique=True))
    n = data.draw(st.sampled_from([20, 20, 20, 0, 3]))
    table = {}
    for name in names:
        sound_column = {"size": 1, "mtime_ns": 2}.get(name, "1") if data.draw(st.booleans()) else None
        kind = data.draw(
            st.sampled_from([st.integers(-9, 9), st.text(max_size=3), st.none() | st.text(), cells])
        )
        table[name] = [sound_column] * n if sound_column is not None else [data.draw(kind) for _ in range(n)]
    file = io.BytesIO()
    try:
        pd.DataFrame(table).to_parquet(file, index=data.draw(st.booleans()))
    except Exception:
        return  # no table that Parquet can hold
    published(copy, manifest, folder, file.getvalue())
    usable(copy)


FUZZ = {"manifests": damaged_manifest, "rows": damaged_rows, "tables": made_up_rows}


@pytest.mark.parametrize("what", FUZZ)
@QUICK
@given(data=st.data())
def test_a_damaged_index_is_one_line(what, sound, tmp_path_factory, data, promise):
    promise("fuzzed: indexes")
    FUZZ[what](sound, tmp_path_factory, data)


@pytest.mark.slow
@pytest.mark.parametrize("what", FUZZ)
@LONG
@given(data=st.data())
def test_five_thousand_damaged_indexes_are_one_line(what, sound, tmp_path_factory, data, promise):
    promise("fuzzed: indexes")
    FUZZ[what](sound, tmp_path_factory, data)
