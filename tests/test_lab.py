"""The tutorial in a real JupyterLab: opened and run as a reader runs it, no cell ends in an error.

It needs JupyterLab, chromium and Playwright, and is skipped where one of them is missing.
"""

import json, os, re, secrets, shutil, signal, subprocess, sys, time

import pytest

from readme import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytest.importorskip("jupyterlab", reason="the test opens JupyterLab")
pytest.importorskip("playwright.sync_api", reason="driving JupyterLab needs playwright")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")
NOTEBOOK = "five_minutes.ipynb"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "(address of a JupyterLab over a copy of the tutorial, its token, its folder)"
    folder, token = tmp_path_factory.mktemp("lab"), secrets.token_hex(16)
    shutil.copy(ROOT / "nbs" / "tutorials" / NOTEBOOK, folder)
    env = {
        **{k: v for k, v in os.environ.items() if k != "IN_TEST"},
        "CPCL_FAST": "1",
        "JUPYTER_CONFIG_DIR": str(folder / ".config"),
        "JUPYTER_DATA_DIR": str(folder / ".data"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / ".settings"),
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--port=0",
        "--allow-root",
        f"--ServerApp.root_dir={folder}",
        f"--IdentityProvider.token={token}",
        "--LabApp.news_url=None",
    ]
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True
        )
    try:
        for _ in range(120):
            found = re.search(
                r"http://(?:localhost|127\.0\.0\.1):(\d+)/lab", (folder / "lab.log").read_text()
            )
            if found or server.poll() is not None:
                break
            time.sleep(0.5)
        assert found, (folder / "lab.log").read_text()[-2000:]
        yield f"http://localhost:{found[1]}", token, folder
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def code_cells(folder):
    "The code cells of the saved notebook that are not empty."
    cells = json.loads((folder / NOTEBOOK).read_text())["cells"]
    return [c for c in cells if c["cell_type"] == "code" and "".join(c["source"]).strip()]


def errors(cells):
    "The messages of cells that ended in an error."
    return [o["evalue"] for c in cells for o in c["outputs"] if o["output_type"] == "error"]


@pytest.mark.slow
def test_five_minutes_runs_in_jupyterlab(lab):
    from playwright.sync_api import sync_playwright

    address, token, folder = lab
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.goto(f"{address}/lab/tree/{NOTEBOOK}?token={token}&reset")
        page.locator(".jp-Notebook .jp-Cell").first.wait_for()
        page.get_by_text(re.compile(r"\| Idle")).first.wait_for()  # the kernel is ready
        page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
        page.get_by_text("Run All Cells", exact=True).click()
        page.get_by_text(re.compile(r"\| Busy")).first.wait_for()
        until = time.time() + 900
        while time.time() < until:
            page.wait_for_timeout(2000)
            page.keyboard.press("Control+s")
            page.wait_for_timeout(500)
            cells = code_cells(folder)
            if errors(cells) or all(c["execution_count"] for c in cells):
                break
        page.keyboard.press("Control+s")
        page.wait_for_timeout(1000)
        browser.close()
    cells = code_cells(folder)
    assert not errors(cells), errors(cells)
    idle = sum(not c["execution_count"] for c in cells)
    assert len(cells) > 15 and not idle, f"{idle} of {len(cells)} cells did not run"
