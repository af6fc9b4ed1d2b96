"The search page in a real browser (Debian's chromium, Playwright); skipped where there is none."

import shutil

import pandas as pd
import pytest

from cpcl.data import load_person, load_split
from cpcl.encoder import EncoderConfig, load_encoder, save_encoder
from cpcl.lab import sample_set
from cpcl.train import make_config
from cpcl.train.start import start_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytest.importorskip("gradio", reason="the page needs gradio")
pytest.importorskip("playwright.sync_api", reason="driving the page needs playwright")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")
HOSTILE = "cam_0/<img src=x onerror=document.title='pwned'>.jpg"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    "(index, address, folder) of a page over the sample set's test people and one hostile file name."
    from cpcl.search import Index, serve

    tmp = tmp_path_factory.mktemp("page")
    split = load_split(sample_set(), split="test")
    crops = tmp / "crops"
    for row in range(len(split.images)):
        out = crops / split.images[row].removeprefix("imgs/")
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(split.path(row), out)
    (crops / HOSTILE).parent.mkdir(exist_ok=True)
    shutil.copy(split.path(0), crops / HOSTILE)
    run = tmp / "run"
    start_run(run, make_config("clip"), {})
    save_encoder(load_encoder(EncoderConfig()), run / "last.safetensors")
    paths = [p.relative_to(crops).as_posix() for p in crops.rglob("*.jpg")]
    cameras = pd.DataFrame({"path": paths, "camera": [p[4] for p in paths]})
    index = Index.build(crops, run, tmp / "idx", cameras, log=lambda line: None)
    with serve(index, port=0, block=False) as page:
        yield index, page.address, split


@pytest.fixture(scope="module")
def browser():
    "A headless Chromium."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, served):
    "A fresh page, opened and ready."
    page = browser.new_page()
    page.set_default_timeout(20_000)
    page.goto(served[1])
    page.locator("#sentence textarea, #sentence input").first.wait_for()
    yield page
    page.close()


def ask(tab, text):
    "Type a sentence, press Enter, wait for the answer."
    box = tab.locator("#sentence textarea, #sentence input").first
    box.fill(text)
    box.press("Enter")
    settle(tab)


ANSWERS = "images, best first|Nothing passes|a query|nothing to search|cannot be read|mark at least"


def settle(tab):
    "Wait until the line under the controls is that of an answer."
    tab.wait_for_function(f"() => /{ANSWERS}/.test(document.querySelector('#line').innerText)")
    tab.wait_for_timeout(400)


def shows(tab, n):
    "Wait until the page shows so many pictures; fails after the page's timeout."
    tab.wait_for_function("n => document.querySelectorAll('#found button img').length === n", arg=n)


def link(tab):
    "The query as the page's link."
    return tab.locator("#address textarea, #address input").first.input_value()


def test_a_sentence_finds_its_person_in_the_first_row(tab, served):
    index, _, split = served
    person = load_person(split)
    # the first caption that the index answers well: the test is about the page, not about the encoder
    for caption, row in zip(split.captions, split.image_of):
        found = index.search(caption, 6)
        right = {
            split.images[i].removeprefix("imgs/") for i in range(len(person)) if person[i] == person[row]
        }
        if right & set(found.path):
            break
    else:
        pytest.fail("no caption finds its person")
    ask(tab, caption)
    shows(tab, 12)
    assert "12 images" in tab.locator("#line").inner_text()
    assert f"1 · {found.score[0]:.2f}" in tab.locator("#found").inner_text()


def test_filter_link_and_more_like_this(tab, browser, served):
    index, address, _ = served
    ask(tab, "a woman in a red coat")
    tab.locator("#filter-0 input").first.click()
    tab.get_by_role("option", name="3", exact=True).click()
    tab.wait_for_function(
        "() => document.querySelector('#address textarea, #address input').value.includes('f.camera=3')"
    )
    at = link(tab)
    expected = index.search("a woman in a red coat", 12, {"camera": "3"})
    settle(tab)
    shows(tab, len(expected))
    again = browser.new_page()
    again.set_default_timeout(20_000)
    again.goto(address.rstrip("/") + "/" + at)
    again.locator("#found img").first.wait_for()
    settle(again)
    shows(again, len(expected))
    assert again.locator("#sentence textarea, #sentence input").first.input_value() == "a woman in a red coat"
    again.close()
    tab.locator("#found button").nth(1).click()
    tab.wait_for_function("() => document.querySelector('#found').innerText.includes('1 · 1.00')")


def test_marked_images_are_asked_with(tab):
    ask(tab, "a man with a backpack")
    before = tab.locator("#found").inner_text()
    tab.locator("#marks input").nth(2).check()
    tab.locator("#again").click()
    tab.wait_for_function("before => document.querySelector('#found').innerText !== before", arg=before)
    shows(tab, 12)


def test_empty_and_over_long_queries_are_answered(tab):
    ask(tab, "   ")
    shows(tab, 0)
    assert "sentence" in tab.locator("#line").inner_text()
    box = tab.locator("#sentence textarea, #sentence input").first
    box.fill("red " * 2000)
    assert len(box.input_value()) == 2000  # the box takes no more; search/11_page tests the server with more
    ask(tab, "a hat")
    shows(tab, 12)


def test_a_hostile_file_name_stays_text_and_no_other_file_is_served(tab, served):
    index, address, _ = served
    ask(tab, "a person")
    assert tab.title() == "Find a person by a sentence"
    from cpcl.search.page import Page, Query

    manifest = index.manifest
    assert HOSTILE in Page(index).like(HOSTILE, Query(k=3)).paths
    for path in ("/etc/passwd", f"{manifest.run}/config.json", manifest.folder):
        for route in ("gradio_api/file=", "file="):
            assert tab.request.get(f"{address.rstrip('/')}/{route}{path}").status in (403, 404), (route, path)
    assert manifest.folder not in tab.content()


def test_a_phone_shows_it_all(browser, served, tmp_path):
    page = browser.new_page(viewport={"width": 400, "height": 800})
    page.set_default_timeout(20_000)
    page.goto(served[1])
    page.locator("#sentence textarea, #sentence input").first.wait_for()
    ask(page, "a woman in a red coat")
    page.screenshot(path=str(tmp_path / "phone.png"), full_page=True)
    assert (tmp_path / "phone.png").stat().st_size > 10_000
    assert page.evaluate("document.documentElement.scrollWidth") <= 410
    page.close()


def test_others_need_a_password(served, monkeypatch):
    from cpcl.core import UserError
    from cpcl.search import serve

    monkeypatch.setenv("CPCL_PASSWORD", "short")
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="8 characters"):
        serve(served[0], host="0.0.0.0", block=False)


def test_the_browser_keeps_nothing_and_asks_nobody_else(browser, served):
    "No other host is asked, and no query is stored: Gradio would keep a history of them."
    page = browser.new_page()
    page.set_default_timeout(20_000)
    asked = set()
    page.on("request", lambda request: asked.add(request.url.split("/")[2]) if "://" in request.url else None)
    page.goto(served[1])
    page.locator("#sentence textarea, #sentence input").first.wait_for()
    ask(page, "a woman in a red coat")
    shows(page, 12)
    assert asked == {served[1].split("/")[2]}
    assert page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 0]
    assert page.evaluate("indexedDB.databases()") == []
    assert all(c["name"].startswith("cpcl-") and c["httpOnly"] for c in page.context.cookies())
    sources = page.evaluate("[...document.querySelectorAll('#found img')].map(i => i.src.slice(0, 23))")
    assert set(sources) == {"data:image/jpeg;base64,"}
    page.close()


def test_an_upload_finds_itself(tab, served):
    index, _, split = served
    tab.get_by_text("More", exact=True).click()
    tab.locator("#upload input[type=file]").set_input_files(str(split.path(0)))
    tab.locator("#upload").get_by_text("KB").first.wait_for()
    tab.locator("#go").click()
    tab.wait_for_function("() => document.querySelector('#found').innerText.includes('1 · 1.00')")


def test_the_password_and_a_link(browser, served):
    "A link to a query asks for the password first, then searches."
    from cpcl.search import serve

    page = browser.new_context(viewport={"width": 400, "height": 800}).new_page()
    page.set_default_timeout(20_000)
    with serve(served[0], port=0, password="correct horse", block=False) as locked:
        page.goto(f"{locked.address}?q=a+woman+in+a+red+coat&k=7")
        assert page.evaluate("document.documentElement.scrollWidth") <= 410
        page.locator("[name=password]").fill("wrong")
        page.get_by_role("button").click()
        page.get_by_text("That is not the password.").wait_for()
        page.locator("[name=password]").fill("correct horse")
        page.get_by_role("button").click()
        shows(page, 7)
        assert page.url.endswith("/?q=a+woman+in+a+red+coat&k=7")
        page.reload()
        shows(page, 7)
    page.context.close()
