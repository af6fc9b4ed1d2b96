"Every file that cpcl reads, damaged or hostile: it is read, or one line says what is wrong."

import contextlib, io, json, struct, tarfile
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from cpcl.cli.training import result_table
from cpcl.train.environment import _earlier
from cpcl.train.settings import read_settings, settings_text
from cpcl.train.start import trained_on
from cpcl.train.trackers import tracker_options
from cpcl.core import UserError
from cpcl.data.doctor import doctor
from cpcl.data.parse import ANNOTATIONS
from cpcl.data.read import load_person, load_split
from cpcl.encoder.towers import Encoder, EncoderConfig
from cpcl.encoder.header import Header, read_header
from cpcl.encoder.weights import load_encoder, read_published, read_weights, save_encoder
from cpcl.files import json_text, read_json
from cpcl.hub import CPCL, is_model
from cpcl.lab.demo import _is_demo
from cpcl.lab.pretrain import _is_pretraining, _write_card
from cpcl.lab.records import read_records
from cpcl.train import make_config
from cpcl.train.checkpoint import load_run, newest_state, read_config, read_history, read_hooks, save_state
from cpcl.train.epoch import build_optimizer
from cpcl.train.restore import fresh_state, restore
from cpcl.train.start import check_run, is_run, start_run

# --- what may be in a file

EVIL = ["hf-hub:a/b", "../../x", "/etc/passwd", "\x1b[2J", "\ud800", "tiny", "last", "NaN", "-1", "1e999", ""]
atoms = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([2**31, 2**63, -(2**63), 10**30, 24_000])
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(EVIL)
)
anything = st.recursive(
    atoms,
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=5), x, max_size=4),
    max_leaves=8,
)
DEEP = [
    "[" * 99 + "]" * 99,
    "[" * 101 + "]" * 101,
    "[" * 100_000,
    '{"a":' * 5_000 + "1" + "}" * 5_000,
    "9" * 5_000,
]


def places(value, path=()):
    "The paths to every value inside a JSON value."
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, v in inside:
        yield from places(v, (*path, key))


def changed(value, path, change):
    "A copy of a JSON value with `change` made to the container at a path, by its last key."
    copy = json.loads(json.dumps(value))
    holder = copy
    for key in path[:-1]:
        holder = holder[key]
    change(holder, path[-1])
    return copy


@st.composite
def documents(draw, valid):
    "A JSON value like a valid one, in which something is missing, added or of another kind."
    value = valid
    for _ in range(draw(st.integers(1, 2))):
        paths = list(places(value))[1:]
        if not paths:
            return draw(anything)
        path = draw(st.sampled_from(paths))
        new = draw(st.just(None) | anything)
        how = draw(st.sampled_from(["replace", "remove", "add", "all"]))
        if how == "all":
            return draw(anything)
        value = changed(
            value,
            path,
            {
                "replace": lambda d, k: d.__setitem__(k, new),
                "remove": lambda d, k: d.__delitem__(k),
                "add": lambda d, k: d.update({"x": new}) if isinstance(d, dict) else d.append(new),
            }[how],
        )
    return value


@st.composite
def damaged(draw, data):
    "Bytes cut, overwritten or put into the middle of others."
    where = draw(st.integers(0, len(data)))
    noise = draw(st.binary(max_size=12))
    how = draw(st.sampled_from(["cut", "over", "into"]))
    if how == "cut":
        return data[:where]
    return data[:where] + noise + data[where + len(noise) * (how == "over") :]


def written(value):
    "JSON as Python writes it: NaN and half surrogates included."
    return json.dumps(value).encode()


@st.composite
def json_files(draw, valid):
    "The bytes of a JSON file that is like a valid one."
    how = draw(st.sampled_from(["other"] * 6 + ["bytes", "bytes", "odd"]))
    if how == "other":
        return written(draw(documents(valid)))
    if how == "bytes":
        return draw(damaged(written(valid)))
    text = draw(st.sampled_from([*DEEP, "", "null", "\ufeff{}", '{"a":1,"a":2}', "[NaN]"]))
    return draw(st.sampled_from([text.encode(), text.encode("utf-16"), written(valid) + text.encode()]))


@st.composite
def json_lines(draw, valid):
    "The bytes of a file with a JSON value a line."
    lines = [written(v) for v in valid]
    lines[draw(st.integers(0, len(lines) - 1))] = draw(json_files(valid[0]))
    return b"\n".join(lines)


@st.composite
def tables(draw):
    "The bytes of a CSV table, or of something that claims to be one."
    mark = draw(st.sampled_from(",;\t|:"))
    cell = st.sampled_from(
        ["image", "caption", "person", "a.jpg", "b.jpg", "", '"', "a man", "é.jpg", "\x00", "\r"]
    )
    rows = draw(st.lists(st.lists(cell | st.text(max_size=5), max_size=5), max_size=4))
    head = draw(st.sampled_from([["image", "caption"], ["image", "caption", "person", ""], [], ["x"]]))
    text = "\n".join(mark.join(r) for r in [head, *rows])
    return draw(st.sampled_from([text, "sep=" + mark + "\n" + text])).encode("utf8", "surrogatepass")


# --- tensors

tensors = st.builds(
    lambda shape, kind: torch.zeros(shape, dtype=kind),
    st.lists(st.integers(0, 9), max_size=4),
    st.sampled_from(
        [torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
    ),
)
stored = st.recursive(
    tensors | st.none() | st.integers(-9, 9) | st.text(max_size=4) | st.just(torch.zeros(3).to_sparse()),
    lambda x: (
        st.lists(x, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.integers(0, 9), x, max_size=3)
        | st.dictionaries(st.sampled_from(["state_dict", "model", "module.a"]), x, max_size=2)
    ),
    max_leaves=6,
)


def safetensors_file(header, body=b"\0" * 64):
    "The bytes of a safetensors file with any header."
    text = written(header)
    return struct.pack("<Q", len(text)) + text + body


def parts(data):
    "(header, body) of a safetensors file."
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


@st.composite
def weight_files(draw, valid, key="cpcl"):
    "The bytes of a safetensors file like a valid one: its own header or the JSON in its metadata is changed."
    header, body = parts(valid)
    how = draw(st.sampled_from(["header", "metadata", "metadata", "bytes", "length"]))
    if how == "bytes":
        return draw(damaged(valid[: len(valid) - len(body) + 100]))
    if how == "length":
        return draw(st.binary(min_size=8, max_size=8)) + valid[8:]
    if how == "header":
        return safetensors_file(draw(documents(header)), body)
    inside = draw(json_files(json.loads(header["__metadata__"][key]))).decode("utf8", "replace")
    header["__metadata__"] = header["__metadata__"] | {key: inside}
    return safetensors_file(header, body)


@st.composite
def torch_files(draw, state):
    "The bytes of a file saved by torch, with anything in it."
    how = draw(st.sampled_from(["anything", "like", "bytes"]))
    value = draw(stored) if how == "anything" else dict(state)
    if how == "like":
        value[draw(st.sampled_from(sorted(state)))] = draw(tensors | stored)
    file = io.BytesIO()
    torch.save(value, file)
    return draw(damaged(file.getvalue())) if how == "bytes" else file.getvalue()


# --- what is read, by which function, from what

NANO = dict(
    embed_dim=8,
    vision_cfg=dict(image_size=[16, 16], layers=1, width=8, head_width=4, patch_size=8),
    text_cfg=dict(context_length=77, vocab_size=49408, width=2, heads=1, layers=1),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A run, a model and a data set, all of them tiny: the tiny CLIP is a thousandth of itself meanwhile."
    base = tmp_path_factory.mktemp("others")
    small = NANO | dict(text_cfg=NANO["text_cfg"] | dict(vocab_size=40, context_length=6))
    with mock.patch.dict("cpcl.encoder.models.TINY", small):
        cfg = make_config("clip", encoder=EncoderConfig("tiny", "", 16, 16))
        encoder = Encoder("tiny", (16, 16))
        start_run(base / "run", cfg, dict(name="own", root="/x", images=2, captions=3, train="0" * 16))
        for which in ("last", "best"):
            save_encoder(encoder, base / "run" / f"{which}.safetensors", epoch=1)
        facts = dict(epoch=0, history=[dict(epoch=0, loss=1.0)], config=dict(samples=9))
        save_state(base / "run" / "state.safetensors", encoder, build_optimizer(encoder, cfg.optim), **facts)
        scores = dict(R1=1.0, R5=2.0, R10=3.0, mAP=4.0, mINP=5.0, queries=9, skipped=0)
        result = dict(last=scores, best=scores, preset="clip", seed=0, split="test", best_by="val mAP")
        (base / "run" / "result.json").write_text(json_text(result))
        (base / "run" / "environment.json").write_text(json_text(dict(command="train", earlier=[])))
        (base / "run" / "history.jsonl").write_text('{"epoch": 0, "loss": 1.5}\n{"epoch": 1, "loss": 1.0}\n')
        CPCL.from_run(base / "run").save_pretrained(base / "model")
        save_encoder(encoder, base / "model" / "w.safetensors", note="x")
        torch.save(encoder.clip.state_dict(), base / "model" / "w.pt")
        for name in ("a.jpg", "imgs/a.jpg", "imgs/b.jpg"):
            (base / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 16)).save(base / "set" / name)
        yield base


def resume(base):
    "What a run looks at before it goes on."
    cfg = make_config("clip", encoder=EncoderConfig("tiny", "", 16, 16))
    check_run(base / "run", cfg, dict(name="own", images=2, captions=3, train="0" * 16), resume=True)
    _earlier(base / "run" / "environment.json")
    state = fresh_state(cfg, Encoder("tiny", (16, 16)), None, torch.device("cpu"))
    restore(base / "run", state, lambda line: None)


def score(base):
    "What `cpcl eval` and the tables read of a run."
    trained_on(base / "run")
    CPCL.from_run(base / "run", "best").generate_model_card()
    result_table(read_json(base / "run" / "result.json"))


def card(base):
    "The card of a pre-training."
    with mock.patch("cpcl.lab.pretrain.load_encoder"), mock.patch("cpcl.lab.pretrain.probe", return_value={}):
        _write_card(base / "model", 3)


def weights(name):
    "Load a file of weights, at the size of its model and at another one."

    def load(base):
        for size in ((16, 16), (24, 16)):
            load_encoder(EncoderConfig("tiny", str(base / "model" / name), *size))

    return load


def data_set(name):
    "Read a data set and have it checked: the second reports whatever the first raises."

    def read(base):
        assert doctor(base / "set", name, decode=False) is not None
        load_person(load_split(base / "set", name))

    return read


def each(*readers):
    "All of some readers, each of which may find something wrong."

    def read(base):
        for reader in readers:
            with contextlib.suppress(UserError):
                reader(base)
        readers[0](base)

    return read


def valid_json(base, file):
    return json.loads((base / file).read_text())


RECORD = [dict(file_path="a.jpg", img_path="a.jpg", id=1, captions=["a man", "he walks"], split="train")]
OWN = [dict(image="a.jpg", caption="a man", person=1, split="train"), dict(image="a.jpg", caption="he runs")]


def parquet():
    "The bytes of a table of captions."
    held = io.BytesIO()
    pd.DataFrame(dict(image=["a.jpg"], captions=[["a man", "he runs"]], person=[1])).to_parquet(held)
    return held.getvalue()


def shard():
    "The bytes of a tar archive with one sample."
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        for name, content in {"0.jpg": b"pixels", "0.txt": b"a man", "0.json": b'{"person": "x"}'}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return held.getvalue()


FILES = {  # what it is -> (file, bytes like those of a valid one, what reads it)
    "a run's config.json": (
        "run/config.json",
        lambda base: json_files(valid_json(base, "run/config.json")),
        each(
            lambda base: read_config(base / "run"),
            lambda base: read_hooks(base / "run"),
            lambda base: load_run(base / "run"),
            lambda base: is_run(base / "run"),
            score,
            resume,
        ),
    ),
    "a run's result.json": (
        "run/result.json",
        lambda base: json_files(valid_json(base, "run/result.json")),
        lambda base: CPCL.from_run(base / "run").generate_model_card(),
    ),
    "a run's environment.json": (
        "run/environment.json",
        lambda base: json_files(valid_json(base, "run/environment.json")),
        resume,
    ),
    "a file of settings": (
        "run/config.yaml",
        lambda base: (
            st.binary(max_size=40) | damaged(settings_text(make_config(), dict(name="own")).encode())
        ),
        lambda base: read_settings(base / "run", dict(data=str, root=str)),
    ),
    "a run's trackers.json": (
        "run/trackers.json",
        lambda base: json_files(dict(wandb=dict(id="0a1b", project="cpcl"))),
        lambda base: tracker_options(base / "run", "wandb"),
    ),
    "a run's history.jsonl": (
        "run/history.jsonl",
        lambda base: json_lines([dict(epoch=0, loss=1.5), dict(epoch=1)]),
        lambda base: read_history(base / "run", 2),
    ),
    "a training state": (
        "run/state.safetensors",
        lambda base: weight_files((base / "run" / "state.safetensors").read_bytes(), "facts"),
        each(
            lambda base: newest_state(base / "run", lambda line: None),
            resume,
            lambda base: _is_pretraining(base / "run"),
        ),
    ),
    "a model's config.json": (
        "model/config.json",
        lambda base: json_files(valid_json(base, "model/config.json")),
        each(
            lambda base: CPCL.from_pretrained(base / "model"),
            lambda base: load_run(base / "model"),
            lambda base: read_published(base / "model"),
            lambda base: is_model(base / "model"),
        ),
    ),
    "a model's weights": (
        "model/model.safetensors",
        lambda base: st.binary(max_size=40) | damaged((base / "model" / "model.safetensors").read_bytes()),
        each(lambda base: CPCL.from_pretrained(base / "model"), lambda base: load_run(base / "model")),
    ),
    "weights": (
        "model/w.safetensors",
        lambda base: weight_files((base / "model" / "w.safetensors").read_bytes()),
        each(weights("w.safetensors"), lambda base: read_header(base / "model" / "w.safetensors")),
    ),
    "weights saved by torch": (
        "model/w.pt",
        lambda base: torch_files(Encoder("tiny", (16, 16)).clip.state_dict()),
        each(weights("w.pt"), lambda base: read_weights(base / "model" / "w.pt")),
    ),
    "the log of a pre-training": (
        "model/log.json",
        lambda base: json_files(dict(config=dict(samples=1, people=2, seed=3), losses=[1.0])),
        each(card, lambda base: _is_pretraining(base / "model")),
    ),
    "the table of a demo": (
        "run/table.json",
        lambda base: json_files({"cpcl": dict(R1=1.0), "clip, fine-tuned on pairs": dict(R1=2)}),
        lambda base: _is_demo(base / "run"),
    ),
    "records": (
        "records.jsonl",
        lambda base: json_lines([dict(spec=dict(name="x"), config={}, result={}, queries={}, history=[])]),
        lambda base: read_records(base / "records.jsonl"),
    ),
    **{
        f"an annotation of {name}": (
            f"set/{ANNOTATIONS[name][0]}",
            lambda base: json_files(RECORD),
            data_set(name),
        )
        for name in ("cuhk-pedes", "icfg-pedes", "rstpreid")
    },
    "an own annotation": ("set/captions.jsonl", lambda base: json_lines(OWN), data_set("own")),
    "a table": ("set/captions.csv", lambda base: tables(), data_set("own")),
    "a Parquet table": ("set/captions.parquet", lambda base: damaged(parquet()), data_set("own")),
    "a shard": ("set/a.tar", lambda base: damaged(shard()), data_set("own")),
}
QUIET = dict(deadline=None, suppress_health_check=list(HealthCheck), database=None)


def check(base, name, cases):
    "Write `cases` files of a kind and read each: it is read, or a UserError of one line names it."
    file, strategy, read = FILES[name]
    before = (base / file).read_bytes() if (base / file).is_file() else None

    @settings(max_examples=cases, **QUIET)
    @given(content=strategy(base))
    def one(content):
        (base / file).write_bytes(content)
        try:
            read(base)
        except UserError as e:
            assert "\n" not in str(e) and len(str(e)) < 2000, str(e)

    try:
        one()
    finally:
        (base / file).unlink() if before is None else (base / file).write_bytes(before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_any_file_is_read_or_refused_in_one_line(name, base, promise):
    promise("files of others: read, or refused in one line", cases=25, kinds=len(FILES))
    check(base, name, 25)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_any_of_many_files_is_read_or_refused_in_one_line(name, base, promise):
    promise("files of others, by the thousands: read, or refused in one line", cases=1300, kinds=len(FILES))
    check(base, name, 1300)


@pytest.mark.filterwarnings("ignore")
def test_what_is_valid_is_read(base, promise):
    "The fuzzers start from files that are read without a complaint."
    promise("files of others: read, or refused in one line", cases=len(FILES))
    resume(base)
    score(base)
    load_run(base / "model")
    assert read_header(base / "model" / "w.safetensors") == Header("tiny", (16, 16), (2, 2), dict(note="x"))
    for name in ("w.safetensors", "w.pt"):
        load_encoder(EncoderConfig("tiny", str(base / "model" / name), 16, 16))
    for name, (file, strategy, read) in FILES.items():
        content = written(RECORD) if "annotation of" in name else None
        if content:
            (base / file).write_bytes(content)
            read(base)
            (base / file).unlink()
    assert Path(base / "run" / "config.json").is_file()
