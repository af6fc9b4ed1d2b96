"A training launched as two processes makes the run of one (the full set of promises is held elsewhere)."
import json, os, subprocess, sys

import pytest

from cpcl.checkpoint import read_history
from cpcl.synth import write_synth


@pytest.mark.slow
def test_two_processes_make_the_same_run(tmp_path):
    root = write_synth(tmp_path / "set", people=24, seed=11, splits=(14, 4, 6))
    command = ["-m", "cpcl.cli", "train", "--root", str(root), "--pretrained", "none", "--height", "48", "--width", "24", "--epochs", "2", "--batch-size", "15",
               "--set", "labels.image.k1=6", "labels.caption.k1=6", "optim.adam_eps=1"]
    # adam_eps=1: Adam divides a gradient by its own size, so where a gradient is nothing but rounding it takes a full step in a random direction, and
    # processes that add up in another order drift apart within an epoch. With eps=1 a step is in proportion to its gradient, and rounding stays rounding.
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command, "--out", str(tmp_path / "one")], check=True, env=env, timeout=300)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29511", *command, "--out", str(tmp_path / "two")], check=True, env=env, timeout=300)
    one, two = (read_history(tmp_path / name) for name in ("one", "two"))
    first, again = one[0], two[0]
    assert len(one) == len(two) == 2
    assert all(first[k] == again[k] for k in ("clusters_img", "clusters_txt", "outliers_img", "outliers_txt_mined"))
    for k in ("loss", "icpm", "pcm", "itc"): assert abs(first[k] - again[k]) < 1e-6 * first[k], k
    # From the second epoch on, float32 sums taken in another order may move a row across DBSCAN's radius; the losses that read no label still agree.
    for k in ("icpm", "itc"): assert abs(one[1][k] - two[1][k]) < 1e-3 * one[1][k], k
    assert json.loads((tmp_path / "two" / "result.json").read_text())["last"]["queries"] > 0
