"Shards mean to cpcl what they mean to the library webdataset."

import io
import json

import pytest
from PIL import Image

from cpcl.data.shards import image_names, read_member, shard_files, shard_rows

wds = pytest.importorskip("webdataset", reason="the library is a tool of developers")


def picture(i):
    "The bytes of a small image."
    held = io.BytesIO()
    Image.new("RGB", (6, 12), (20 * i, 90, 200 - 20 * i)).save(held, "PNG")
    return held.getvalue()


def samples():
    "Nine samples with short, nested, dotted, accented and very long keys."
    keys = ["0", "cam1/0002", "cam1/0003", "d.r/0004", "é/5", "x" * 130 + "/6", "7 8", "cam2/0003", "Z"]
    for i, key in enumerate(keys):
        about = dict(caption=[f"a man {i}", "he walks"], person=f"p{i // 2}", split="train")
        yield {"__key__": key, "png": picture(i), "json": about}


def test_what_the_library_writes_is_read_as_the_library_reads_it(tmp_path):
    "Three shards: the same samples in the same order, images byte by byte, captions and persons."
    with wds.ShardWriter(f"{tmp_path}/set-%06d.tar", maxcount=4, verbose=0) as writer:
        for sample in samples():
            writer.write(sample)
    shards = shard_files(tmp_path / "set-{000000..000002}.tar")
    theirs = list(wds.WebDataset([str(s) for s in shards], shardshuffle=False))
    ours = [row for shard in shards for row in shard_rows(shard)]
    assert len(theirs) == len(ours) == 9
    for sample, (key, row) in zip(theirs, ours):
        shard, _, inside = row["image"].partition("/")
        about = json.loads(sample["json"])
        assert key == f"{shard}/{sample['__key__']}"
        assert read_member(tmp_path / shard, inside) == sample["png"]
        assert (row["captions"], row["person"], row["split"]) == (about["caption"], about["person"], "train")
    assert sum(len(image_names(s)) for s in shards) == 9
