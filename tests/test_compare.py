"`cpcl compare` and `cpcl report` on run folders, with the weights that a training starts from."

import json, re, shutil

from commands import cpcl
import pandas as pd
import pytest

from cpcl.data import load_split
from cpcl.encoder import EncoderConfig, load_encoder, save_encoder
from cpcl.files import write_json
from cpcl.synth.dataset import write_synth
from cpcl.train import make_config
from cpcl.train.checkpoint import write_history
from cpcl.train.environment import environment
from cpcl.train.runs import RunResult, score_run
from cpcl.train.start import data_facts, start_run

SMALL = EncoderConfig("tiny", "", 48, 24)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def copied(run, to, weights=None, **settings):
    "A copy of a run with other settings in its configuration, and perhaps the weights of another one."
    shutil.copytree(run, to, ignore=shutil.ignore_patterns(".cpcl-lock", "tensorboard", "state*"))
    held = json.loads((to / "config.json").read_text())
    for name, value in settings.items():
        held["config" if name in held["config"] else "data"][name] = value
    (to / "config.json").write_text(json.dumps(held))
    if weights:
        shutil.copy(weights / "last.safetensors", to)
    return to


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Runs of two presets, and copies of them that say that they had another seed."
    base = tmp_path_factory.mktemp("runs")
    root = write_synth(base / "set", people=24, seed=11, layout="cuhk-pedes", splits=(14, 4, 6))
    splits = {name: load_split(root, split=name) for name in ("train", "val", "test")}
    for preset in ("cpcl", "clip"):
        cfg = make_config(preset, encoder=SMALL, images=28, captions=56, changes={"optim.epochs": 1})
        run = base / preset
        start_run(run, cfg, data_facts(**splits) | dict(weights=""))
        for which in ("last", "best"):
            save_encoder(load_encoder(SMALL), run / f"{which}.safetensors")
        row = dict(epoch=0, loss=1.0, lr=0.1, seconds=dict(steps=1.0), val_R1=10.0, val_mAP=12.0)
        write_history(run, [row])
        result = RunResult(
            **score_run(run, splits["test"]), preset=preset, seed=0, split="test", best_by="val"
        )
        write_json(run / "result.json", result.as_dict())
        write_json(run / "environment.json", environment())
    copied(base / "cpcl", base / "cpcl-1", base / "clip", seed=1)
    copied(base / "clip", base / "clip-1", base / "cpcl", seed=1)
    return base


def test_a_comparison_has_the_scores_of_eval(runs, tmp_path, promise):
    promise("a comparison has the scores of eval", cases=2)
    code, out, err = cpcl("compare", runs / "clip", runs / "cpcl", "--csv", tmp_path / "x.csv")
    assert code == 0 and out.count(", one seed") == 6 and "wrote" in out, (out, err)
    table = pd.read_csv(tmp_path / "x.csv").set_index(["method", "metric"])
    for name in ("clip", "cpcl"):
        mine = json.loads(cpcl("eval", runs / name, "--json")[1])["text to image"]
        for metric in ("R1", "R10", "mAP", "mINP"):
            assert table.loc[(name, metric), "mean"] == pytest.approx(mine[metric])
    assert set(table.verdict.dropna()) == {"one seed"} and table.low.isna().all()


def test_runs_that_differ_in_their_seed_are_one_method(runs, tmp_path, promise):
    promise("runs with other seeds are one method")
    words = [runs / name for name in ("clip", "cpcl", "clip-1", "cpcl-1")]
    code, out, err = cpcl("compare", *words, "--csv", tmp_path / "x.csv", "--latex", tmp_path / "x.tex")
    table = pd.read_csv(tmp_path / "x.csv")
    assert code == 0 and list(table.method.unique()) == ["clip", "cpcl"] and set(table.seeds) == {"0 1"}
    own = table[table.method == "cpcl"]
    inside = (own.difference_low <= own.difference) & (own.difference <= own.difference_high)
    assert inside.all() and set(own.verdict) <= {"better", "worse", "open"}
    # the weights were exchanged, so that both methods hold the same two results
    assert own.difference.abs().max() < 1e-9 and set(own.verdict) == {"open"}
    tex = (tmp_path / "x.tex").read_text()
    assert re.search(r"^clip & 2 & .* \\\\$", tex, re.M) and tex.startswith(r"\begin{tabular}{lrllll}")


def test_val_is_another_part(runs, promise):
    promise("a comparison is on the split that is asked for")
    code, out, err = cpcl("compare", runs / "clip", runs / "cpcl", "--split", "val")
    assert code == 0 and "val split" in out and " 4 people" in out, (out, err)


def test_what_cannot_be_compared_is_one_line(runs, tmp_path, promise):
    other = copied(runs / "cpcl", tmp_path / "other", seed=2, test="f" * 16)
    moved = copied(runs / "clip", tmp_path / "moved", root=str(tmp_path / "gone"))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    cases = {
        ("compare",): "give two runs or more",
        ("compare", runs / "clip"): "give two runs or more",
        ("compare", runs / "clip", runs / "clip"): "the same method with the same seed",
        ("compare", runs / "clip", other): "different data (their test splits differ)",
        ("compare", moved, runs / "cpcl"): "give --root, its place now",
        ("compare", runs / "clip", tmp_path / "none"): "is not a run folder",
        ("compare", runs / "clip", tmp_path / "damaged"): "is not valid JSON",
        ("compare", runs / "clip", runs / "cpcl", "--csv", tmp_path): "is a folder: name a file",
        ("compare", runs / "clip", runs / "cpcl", "--split", "train"): "invalid choice",
        ("report", tmp_path / "none"): "is not a run folder",
        ("report", tmp_path / "damaged"): "is not valid JSON",
        ("report", runs / "clip", "--out", tmp_path): "is a folder: name a file",
        ("report", runs / "clip", "--out", runs / "clip" / "config.json" / "x.html"): "cannot write",
    }
    promise("what cannot be compared or reported is one line", cases=len(cases))
    for words, wanted in cases.items():
        code, out, err = cpcl(*words)
        assert code == 2 and wanted in err and err.count("\n") == 1, (words, out, err)
    code, out, err = cpcl("compare", moved, runs / "cpcl", "--root", runs / "set")
    assert code == 0 and "note" not in out, (out, err)


def test_a_report_needs_no_other_file(runs, tmp_path, promise):
    "The report of a run: its scores, its epoch and its settings, and no address outside of itself."
    promise("the report of a run needs no other file")
    code, out, err = cpcl("report", runs / "cpcl", "--out", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf8")
    assert code == 0 and "1 of 1 epochs are complete" in page, (out, err)
    last = json.loads((runs / "cpcl" / "result.json").read_text())["last"]
    assert f"{last['mAP']:.2f}" in page and "labels.image.k1" in page and "torch" in page
    assert page.count("data:image/svg+xml;base64,") >= 3
    assert "http" not in re.sub(r"base64,[^\"]*|http-equiv", "", page)


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")
def test_a_browser_asks_nobody_for_a_report(runs, tmp_path, promise):
    playwright = pytest.importorskip("playwright.sync_api")
    promise("a browser asks nobody for a report", cases=2)
    assert cpcl("report", runs / "cpcl", "--out", tmp_path / "r.html")[0] == 0
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for width in (400, 1200):
            page, asked, said = browser.new_page(viewport=dict(width=width, height=900)), [], []
            page.on("request", lambda r: asked.append(r.url))
            page.on("console", lambda m: said.append(m.text))
            page.goto(f"file://{tmp_path}/r.html")
            shown = "[...document.images].every(i => i.complete && i.naturalWidth > 100)"
            fits = "document.documentElement.scrollWidth <= window.innerWidth"
            assert page.evaluate(shown) and page.evaluate(fits) and said == [], said
            assert all(url.startswith(("file:///", "data:image/")) for url in asked)
        browser.close()
