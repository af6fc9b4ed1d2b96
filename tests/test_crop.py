"`cpcl crop`: what goes in, what an interruption leaves, and that `cpcl index` takes what comes out."

import errno, json, os, signal, subprocess, sys, time

from commands import cpcl
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torchvision.models import get_model

from cpcl.search.crops import CropConfig, crop_people
from cpcl.search.detector import Detector
from cpcl.search.journal import JOURNAL

NAME = "fasterrcnn_mobilenet_v3_large_320_fpn"
ANYBODY = ("--detector", NAME, "--min-score", "0", "--min-height", "1", "--device", "cpu")
OTHER = "ssdlite320_mobilenet_v3_large"
BOXES = [[10, 10, 40, 100], [60, 5, 100, 110]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "A file of weights of a detector that was never trained, and knows people only."
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "w.pth"
    model = get_model(NAME, weights=None, weights_backbone=None, num_classes=2)
    torch.save({"model": model.state_dict()}, file)
    return file


def photographs(folder, n=3):
    "A folder of noise, each picture another one."
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        noise = np.random.default_rng(i).integers(0, 256, (120, 160, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{i:02d}.png")
    return folder


def finds_two(images):
    "A detector with torchvision's interface that finds the same two people in every image."
    boxes, labels = torch.tensor(BOXES, dtype=torch.float32), torch.ones(2, dtype=torch.long)
    return [dict(boxes=boxes, labels=labels, scores=torch.tensor([0.95, 0.9]))] * len(images)


def cropped(source, out, model=finds_two, **options):
    "The table and the lines of a cropping with the detector above."
    lines = []
    cfg = CropConfig(**{k: options.pop(k) for k in list(options) if hasattr(CropConfig, k)})
    table = crop_people(source, out, Detector(model, "two"), cfg, log=lines.append, **options)
    return table, lines


# --- from photographs to an answer


def test_crops_are_indexed_with_their_table(weights, tmp_path, promise):
    "`cpcl index CROPS --columns CROPS/crops.csv` takes what `cpcl crop` wrote, and a column filters."
    from cpcl.encoder import EncoderConfig, load_encoder, save_encoder
    from cpcl.train import make_config
    from cpcl.train.start import start_run

    promise("crops are indexed with their table")
    small = EncoderConfig("tiny", "", 48, 24)
    start_run(tmp_path / "run", make_config("clip", encoder=small), {})
    save_encoder(load_encoder(small), tmp_path / "run" / "last.safetensors")
    photographs(tmp_path / "photos" / "north, gate", 2)
    out = tmp_path / "crops"
    code, said, err = cpcl("crop", tmp_path / "photos", "--out", out, "--weights", weights, *ANYBODY)
    assert (code, err) == (0, ""), err
    table = pd.read_csv(out / "crops.csv")
    assert len(table) and set(table.source) == {"north, gate/00.png", "north, gate/01.png"}
    assert f"next: cpcl index {out} --columns {out}/crops.csv" in said
    words = ["index", out, "--run", tmp_path / "run", "--out", tmp_path / "index"]
    code, said, err = cpcl(*words, "--columns", out / "crops.csv")
    assert code == 0 and f"{len(table):,} images indexed" in said and "have no row" not in said, (said, err)
    asked = ["search", tmp_path / "index", "a man", "--json", "-k", "500"]
    code, said, err = cpcl(*asked, "--where", "source=north, gate/00.png")
    found = json.loads(said)
    assert code == 0 and len(found) == (table.source == "north, gate/00.png").sum(), err
    (row,) = table[table.path == found[0]["path"]].to_dict("records")
    assert float(found[0]["confidence"]) == row["confidence"] and float(found[0]["left"]) == row["left"]


def test_a_crop_is_what_the_box_holds(tmp_path, promise):
    "Deep greys, transparency and a photograph on its side are cut where the person is; no place is kept."
    promise("a crop shows what the box holds", cases=4)
    folder = tmp_path / "photos"
    folder.mkdir()
    ramp = np.add.outer(np.arange(120), np.arange(160)) * 200
    grey = np.uint8(ramp / 65535 * 255 + 0.5)
    Image.fromarray(ramp.astype(np.uint16)).save(folder / "deep.png")
    Image.merge("LA", [Image.fromarray(grey), Image.new("L", (160, 120), 255)]).save(folder / "glass.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "the camera"
    lying = Image.fromarray(grey).convert("CMYK").transpose(Image.Transpose.ROTATE_90)
    lying.save(folder / "phone.jpg", exif=exif, quality=95)
    Image.fromarray(grey).convert("P").save(folder / "few.gif")
    table, _ = cropped(folder, tmp_path / "crops", margin=0.0)
    assert len(table) == 8
    left, top, right, bottom = BOXES[0]
    for path in table.path[table.path.str.endswith("/1.jpg")]:
        with Image.open(tmp_path / "crops" / path) as crop:
            shown = np.asarray(crop.convert("L"), float)
            assert crop.mode == "RGB" and not crop.getexif() and not crop.info.get("exif")
        assert shown.shape == (bottom - top, right - left)
        assert np.abs(shown - grey[top:bottom, left:right]).mean() < 3, path


def test_heads_are_blurred_before_anyone_is_cut_out(tmp_path, promise):
    promise("heads can be blurred")
    photographs(tmp_path / "photos", 1)
    sharp, _ = cropped(tmp_path / "photos", tmp_path / "a", margin=0.0)
    blurred, _ = cropped(tmp_path / "photos", tmp_path / "b", margin=0.0, blur_heads=True)
    for path, height in zip(sharp.path, sharp.bottom - sharp.top):
        a, b = (np.asarray(Image.open(tmp_path / d / path), float) for d in "ab")
        head = round(0.2 * height)
        assert b[: head - 8].std() < 0.3 * a[: head - 8].std()
        assert np.abs(a - b)[head + 8 :].mean() < 1


# --- going on


def test_only_what_is_new_or_changed_is_looked_at(tmp_path, promise):
    promise("a second cropping looks at what is new or changed")
    folder, out, asked = photographs(tmp_path / "photos"), tmp_path / "crops", []

    def counts(images):
        asked.append(len(images))
        return finds_two(images)

    cropped(folder, out, counts)
    assert sum(asked) == 3
    (folder / "00.png").unlink()
    Image.new("RGB", (160, 130)).save(folder / "01.png")
    Image.new("RGB", (160, 130)).save(folder / "new.png")
    table, lines = cropped(folder, out, counts)
    assert sum(asked) == 5 and "2 files were changed or removed since" in lines[0]
    assert set(table.source) == {"01.png", "02.png", "new.png"} and not (out / "00.png").exists()
    on_disk = {str(p.relative_to(out)) for p in out.rglob("*.jpg")}
    assert on_disk == set(table.path)


def test_a_full_disk_is_one_line_and_keeps_what_is_there(tmp_path, monkeypatch, promise):
    promise("a full disk while cropping is one line")
    folder, out, save, made = photographs(tmp_path / "photos"), tmp_path / "crops", Image.Image.save, []

    def full(self, file, *rest, **options):
        if len(made) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        made.append(file)
        return save(self, file, *rest, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ValueError, match="No space left on device"):
        cropped(folder, out, batch_size=1)
    assert len(pd.read_csv(out / "crops.csv")) == 2
    monkeypatch.setattr(Image.Image, "save", save)
    table, _ = cropped(folder, out, batch_size=1)
    assert len(table) == 6 and {str(p.relative_to(out)) for p in out.rglob("*.jpg")} == set(table.path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_cropping_that_is_stopped_goes_on(number, weights, tmp_path, promise):
    "Whatever stops it, the same command ends with the crops and the table of a run that was not stopped."
    promise("a cropping that is stopped goes on")
    folder = photographs(tmp_path / "photos", 40)

    def command(out):
        words = ["crop", folder, "--out", out, "--weights", weights, *ANYBODY, "--batch-size", 1]
        return [sys.executable, "-m", "cpcl.cli", *map(str, words)]

    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    done = subprocess.Popen(command(stopped), **pipes)
    until = time.time() + 100
    while not (stopped / JOURNAL).is_file() or (stopped / JOURNAL).read_text().count("\n") < 4:
        assert time.time() < until and done.poll() is None
        time.sleep(0.02)
    done.send_signal(number)
    _, err = done.communicate(timeout=100)
    if number != signal.SIGKILL:
        assert done.returncode == 128 + number and err.strip().count("\n") == 0, err
        assert "the same command continues with what was not looked at" in err
        assert 0 < len(pd.read_csv(stopped / "crops.csv")) and "Traceback" not in err
    for out in (stopped, straight):
        assert subprocess.run(command(out), capture_output=True).returncode == 0
    held = [
        {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.suffix in (".jpg", ".csv")}
        for out in (stopped, straight)
    ]
    assert held[0] == held[1] and len(held[0]) > 40


# --- videos


def video(path, frames=30, rate=10):
    "A video of noise whose frames differ."
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for i in range(frames):
            noise = np.random.default_rng(i).integers(0, 256, (120, 160, 3), np.uint8)
            film.mux(stream.encode(av.VideoFrame.from_ndarray(noise, "rgb24")))
        film.mux(stream.encode())
    return path


def test_a_video_becomes_crops_with_frame_and_time(tmp_path, promise):
    promise("a video becomes crops with frame and time", cases=2)
    film = video(tmp_path / "a.mp4")
    table, lines = cropped(film, tmp_path / "crops", every=0.5)
    assert list(table.frame) == [f for f in (0, 5, 10, 15, 20, 25) for _ in "12"]
    assert np.allclose(table.time, table.frame.astype(float) / 10)
    assert table.path[2] == "a.mp4/0000005-1.jpg" and (tmp_path / "crops" / table.path[2]).is_file()
    photographs(tmp_path / "both", 2)
    video(tmp_path / "both" / "b.mkv")
    (tmp_path / "both" / "c.avi").write_bytes(b"RIFF no video")
    table, lines = cropped(tmp_path / "both", tmp_path / "more")
    assert set(table.source) == {"00.png", "01.png", "b.mkv"} and table.frame.isna().sum() == 4
    assert any("cannot read the video" in line and "c.avi" in line for line in lines)


def test_a_video_that_was_stopped_goes_on(tmp_path, promise):
    promise("a video that was stopped goes on")
    film, asked = video(tmp_path / "a.mp4"), []

    def stops(images):
        asked.append(len(images))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return finds_two(images)

    with pytest.raises(KeyboardInterrupt):
        cropped(film, tmp_path / "crops", stops, every=0.5, batch_size=1)
    assert len(pd.read_csv(tmp_path / "crops" / "crops.csv")) == 4
    table, _ = cropped(film, tmp_path / "crops", stops, every=0.5, batch_size=1)
    assert len(asked) == 3 + 4 and len(table) == 12
    cropped(film, tmp_path / "crops", stops, every=0.5)
    assert len(asked) == 7  # it was read to its end


# --- errors

WRONG = {
    "no such folder": ("crop none --out OUT", "no such file or folder: none"),
    "an empty folder": ("crop EMPTY --out OUT", "holds no image"),
    "a text": ("crop TEXT --out OUT", "neither an image nor a video"),
    "the folder itself": ("crop PHOTOS --out PHOTOS", "is also what is read"),
    "a folder of others": ("crop PHOTOS --out FULL", "is not empty and was not made by `cpcl crop`"),
    "a file as folder": ("crop PHOTOS --out TEXT", "is a file and not a folder"),
    "another detector": ("crop PHOTOS --out OUT --detector yolo", "torchvision has no detector 'yolo'"),
    "no weights": ("crop PHOTOS --out OUT --weights none.pth", "no such file: none.pth"),
    "a text as weights": ("crop PHOTOS --out OUT --weights TEXT", "not a plain file of weights"),
    "weights of another": (f"crop PHOTOS --out OUT --weights WEIGHTS --detector {OTHER}", f"not fit {OTHER}"),
    "no such device": ("crop PHOTOS --out OUT --device tpu", "no device 'tpu' here"),
    "a name that is none": ("crop PHOTOS --out r_\udce9", "not valid Unicode"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line(case, weights, tmp_path, monkeypatch, promise):
    promise("bad input of cpcl crop is one line")
    monkeypatch.chdir(tmp_path)
    places = {"PHOTOS": photographs(tmp_path / "photos", 1), "WEIGHTS": weights}
    for name, path in {"EMPTY": "empty", "FULL": "full", "OUT": "out"}.items():
        places[name] = tmp_path / path
    for name in ("EMPTY", "FULL"):
        places[name].mkdir()
    (places["FULL"] / "mine.txt").write_text("mine")
    places["TEXT"] = tmp_path / "a.txt"
    places["TEXT"].write_text("text")
    words, wanted = WRONG[case]
    before = sorted(tmp_path.rglob("*"))
    code, out, err = cpcl(*(places.get(w, w) for w in words.split(" ")))
    assert code == 2 and wanted in err and err.count("\n") == 1 and out == "", (out, err)
    assert sorted(tmp_path.rglob("*")) == before


def test_no_network_is_one_line(tmp_path, monkeypatch, promise):
    "The weights of torchvision are asked for where they are; without a network the line says what to do."
    import urllib.error

    promise("no network while cropping is one line")
    asked = []

    def unreachable(url, *rest, **options):
        asked.append(url)
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    code, out, err = cpcl(
        "crop", photographs(tmp_path / "photos", 1), "--out", tmp_path / "out", "--device", "cpu"
    )
    assert asked and asked[0].startswith("https://download.pytorch.org/models/fasterrcnn_resnet50_fpn_v2")
    assert code == 2 and "no route to host" in err and "--weights FILE" in err, err
    assert err.strip().splitlines()[-1].startswith("cpcl: ") and not (tmp_path / "out").exists()


def test_files_that_cannot_be_read_are_reported_and_tried_again(tmp_path, promise):
    promise("what cannot be read while cropping is reported")
    folder = photographs(tmp_path / "photos", 2)
    for name in ("page.jpg", "half.png", "no.jpg", "none.jpg"):
        (folder / name).write_bytes(b"<html>" if name == "page.jpg" else b"\x89PNG")
    table, lines = cropped(folder, tmp_path / "crops")
    assert len(table) == 4 and sum("cannot read the image" in line for line in lines) == 3
    assert "... and 1 more that could not be read completely" in lines
    photographs(folder, 1)
    os.replace(folder / "00.png", folder / "page.jpg")
    table, lines = cropped(folder, tmp_path / "crops")
    assert set(table.source) == {"01.png", "page.jpg"}
