"The search page in a real browser (Debian's chromium, Playwright); skipped where there is none."

import contextlib
import shutil
from urllib.parse import quote, unquote_plus

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
TEMPLATE = "cam_0/${document.title='pwned'}{{7}}`.jpg"
SENTENCE = "a woman in a red coat"


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    "Over the sample set's test people and two hostile file names."
    from cpcl.search import Index

    tmp = tmp_path_factory.mktemp("page")
    split = load_split(sample_set(), split="test")
    crops = tmp / "crops"
    for row in range(len(split.images)):
        out = crops / split.images[row].removeprefix("imgs/")
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(split.path(row), out)
    for name in (HOSTILE, TEMPLATE):
        (crops / name).parent.mkdir(exist_ok=True)
        shutil.copy(split.path(0), crops / name)
    run = tmp / "run"
    start_run(run, make_config("clip"), {})
    save_encoder(load_encoder(EncoderConfig()), run / "last.safetensors")
    paths = [p.relative_to(crops).as_posix() for p in crops.rglob("*.jpg")]
    columns = pd.DataFrame({"path": paths, "camera": [p[4] for p in paths], "note": "<b>late & dark</b>"})
    return Index.build(crops, run, tmp / "idx", columns, log=lambda line: None)


@pytest.fixture(scope="module")
def served(index):
    "(index, address, split) of a page."
    from cpcl.search import serve

    with serve(index, port=0, block=False) as page:
        yield index, page.address, load_split(sample_set(), split="test")


@pytest.fixture(scope="module")
def browser():
    "A headless Chromium."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, address, **options):
    "A page in a browser that has asked nothing yet."
    page = browser.new_page(**options)
    page.set_default_timeout(20_000)
    page.goto(address)
    page.locator(BOX).first.wait_for()
    yield page
    page.close()


@pytest.fixture
def tab(browser, served):
    "A fresh page, opened and ready."
    with opened(browser, served[1]) as page:
        yield page


BOX = "#sentence textarea, #sentence input"


def ask(tab, text, says=None):
    "Type a sentence, press Enter, wait for the answer."
    box = tab.locator(BOX).first
    box.fill(text)
    box.press("Enter")
    says_(tab, says or f"“{text}”")


def says_(tab, text):
    "Wait until the line above the list holds a text."
    tab.wait_for_function("text => document.querySelector('#line')?.innerText.includes(text)", arg=text)


def shows(tab, n):
    "Wait until the page shows so many pictures; fails after the page's timeout."
    tab.wait_for_function("n => document.querySelectorAll('#found .hit img').length === n", arg=n)


def paths(tab):
    "The paths below the pictures."
    return tab.locator("#found .path").all_inner_texts()


def card(tab, rank):
    "One picture with what belongs to it."
    return tab.locator("#found .hit").nth(rank - 1)


def link(tab):
    "The list as the page's link."
    return tab.locator("#link").get_attribute("href")


def test_a_sentence_finds_its_person_in_the_first_row(tab, served):
    index, _, split = served
    person = load_person(split)
    # the first caption that the index answers well: the test is about the page, not about the encoder
    for caption, row in zip(split.captions, split.image_of):
        found = index.search(caption, 12)
        same = [split.images[i].removeprefix("imgs/") for i in range(len(person)) if person[i] == person[row]]
        if set(same) & set(found.path[:6]):
            break
    else:
        pytest.fail("no caption finds its person")
    ask(tab, caption)
    shows(tab, 12)
    assert "12 images" in tab.locator("#line").inner_text()
    assert paths(tab) == list(found.path)
    first = card(tab, 1).inner_text()
    assert f"1 · {found.score[0]:.2f}" in first and "<b>late & dark</b>" in first
    assert f"camera\n{found.camera[0]}" in first


def test_a_filter_asks_again_and_a_link_opens_the_same_list(tab, browser, served):
    index, address, _ = served
    ask(tab, SENTENCE)
    tab.locator("#filter-0 input").first.click()
    tab.get_by_role("option", name="3", exact=True).click()
    says_(tab, "only camera 3")
    expected = list(index.search(SENTENCE, 12, {"camera": "3"}).path)
    assert "f.camera=3" in link(tab) and paths(tab) == expected
    with opened(browser, address.rstrip("/") + "/" + link(tab)) as again:
        says_(again, "only camera 3")
        assert again.locator(BOX).first.input_value() == SENTENCE
        assert paths(again) == expected
        ask(again, "a man")
        assert again.evaluate("location.search") == ""  # the address no longer says what is not shown


def test_more_like_this_says_so_everywhere(tab, browser, served):
    index, address, _ = served
    ask(tab, SENTENCE)
    before = paths(tab)
    card(tab, 2).get_by_text("More like this").click()
    says_(tab, f"12 images most like {before[1]}")
    chosen = tab.locator("#found .hit.chosen")
    assert chosen.locator(".path").all_inner_texts() == [before[1]]
    assert "the one you chose" in chosen.evaluate(
        "e => getComputedStyle(e.querySelector('.score'), '::after').content"
    )
    assert tab.locator(BOX).first.input_value() == ""
    assert unquote_plus(link(tab)) == f"?like={before[1]}&k=12"
    assert paths(tab) == list(index.search(image=before[1], k=12).path)
    with opened(browser, address.rstrip("/") + "/" + link(tab)) as again:
        says_(again, f"most like {before[1]}")
    tab.locator("#back").click()
    says_(tab, SENTENCE)
    assert paths(tab) == before and tab.locator(BOX).first.input_value() == SENTENCE
    assert not tab.locator("#back").is_visible()


def test_marks_are_on_the_pictures_and_asked_with(tab, browser, served):
    index, address, _ = served
    ask(tab, "a man with a backpack")
    before = paths(tab)
    assert tab.locator("#again").is_disabled()
    card(tab, 3).get_by_role("button", name="picture 3 is right").click()
    wrong = card(tab, 1).get_by_role("button", name="picture 1 is wrong")
    card(tab, 1).get_by_role("button", name="picture 1 is right").click()
    wrong.click()  # instead of right
    assert wrong.get_attribute("aria-pressed") == "true"
    box, mark = card(tab, 1).locator(".picture").bounding_box(), wrong.bounding_box()
    assert box["x"] < mark["x"] and mark["y"] + mark["height"] < box["y"] + box["height"]
    tab.locator("#again").click()
    says_(tab, "asked again with 1 marked right and 1 marked wrong")
    assert paths(tab) == list(index.more_like([before[2]], [before[0]], "a man with a backpack", 12).path)
    assert tab.locator("#found .hit.right .path").all_inner_texts() == [before[2]]
    with opened(browser, address.rstrip("/") + "/" + link(tab)) as again:
        says_(again, "1 marked wrong")
        assert paths(again) == paths(tab)


def test_empty_and_over_long_queries_are_answered(tab):
    ask(tab, "   ", "give a sentence")
    shows(tab, 0)
    box = tab.locator(BOX).first
    box.fill("red " * 2000)
    assert len(box.input_value()) == 2000  # the box takes no more; search/17_page tests the server with more
    ask(tab, "a hat")
    shows(tab, 12)


def test_hostile_file_names_stay_text_and_no_other_file_is_served(tab, served):
    index, address, _ = served
    manifest = index.manifest
    for name in (HOSTILE, TEMPLATE):
        tab.goto(f"{address}?like={quote(name)}&k=3")
        says_(tab, f"most like {name}")
        assert name in paths(tab) and tab.title() == "Find a person by a sentence"
    for path in ("/etc/passwd", f"{manifest.run}/config.json", manifest.folder):
        for route in ("gradio_api/file=", "file="):
            assert tab.request.get(f"{address.rstrip('/')}/{route}{path}").status in (403, 404), (route, path)
    assert manifest.folder not in tab.content()


def test_a_picture_is_enlarged(tab):
    ask(tab, SENTENCE)
    for _ in range(2):  # the same one twice
        card(tab, 1).get_by_role("button", name="enlarge picture 1").click()
        tab.locator("dialog[open] img").wait_for()
        assert tab.locator("dialog img").bounding_box()["height"] > 300
        assert paths(tab)[0] in tab.locator("dialog").inner_text()
        tab.keyboard.press("Escape")
        tab.locator("dialog").wait_for(state="hidden")
    assert tab.locator("#found .hit").count() == 12


def saved(tab, button, folder):
    "The file that a button saves."
    with tab.expect_download() as download:
        tab.locator(button).click()
    file = folder / download.value.suggested_filename
    download.value.save_as(file)
    return file


def test_what_is_shown_can_be_saved(tab, browser, served, tmp_path):
    "The table and the page hold the list, no folder of the machine, and nothing that is fetched or run."
    index, _, _ = served
    ask(tab, SENTENCE)
    card(tab, 1).get_by_role("button", name="picture 1 is right").click()
    table = pd.read_csv(saved(tab, "#csv", tmp_path), dtype={"camera": str})
    assert table.equals(index.search(SENTENCE, 12))
    file = saved(tab, "#html", tmp_path)
    text, asked = file.read_text(encoding="utf8"), []
    assert index.manifest.folder not in text and "<script" not in text and "<button" not in text
    page = browser.new_page(viewport={"width": 400, "height": 800})
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    assert page.locator(".hit img").evaluate_all("all => all.map(i => i.naturalHeight > 0)") == [True] * 12
    assert page.locator(".path").all_inner_texts() == list(table.path)
    assert SENTENCE in page.locator("body").inner_text() and page.locator(".hit.right").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    page.close()


def test_moved_images_are_not_an_empty_list(tab, served):
    from pathlib import Path

    folder = Path(served[0].manifest.folder)
    ask(tab, SENTENCE)
    folder.rename(folder.with_name("away"))
    try:
        ask(tab, "a man", "The images of this index have been moved")
        shows(tab, 0)
    finally:
        folder.with_name("away").rename(folder)
    ask(tab, "a man")
    shows(tab, 12)


# --- how it looks

OVERFLOWS = """() => [...document.querySelectorAll('body *')].filter(e => {
    const style = getComputedStyle(e), box = e.getBoundingClientRect();
    const scrolls = /auto|scroll/.test(style.overflowX + style.overflowY) && box.width && box.height;
    const over = e.scrollHeight > e.clientHeight + 1 || e.scrollWidth > e.clientWidth + 1;
    return scrolls && over && !/^(TEXTAREA|HTML|BODY)$/.test(e.tagName);
}).map(e => e.tagName + '.' + e.className + '#' + e.id)"""
SMALL = """least => [...document.querySelectorAll('button, a[href], input, select, textarea')].filter(e => {
    const box = e.getBoundingClientRect(), style = getComputedStyle(e);
    const seen = box.width > 1 && box.height > 1 && style.visibility !== 'hidden' && style.opacity !== '0';
    return seen && Math.min(box.width, box.height) < (e.closest('.answer') ? least : 24);
}).map(e => e.outerHTML.slice(0, 120))"""
UNNAMED = """() => [...document.querySelectorAll('button, a[href], input, textarea, img')].filter(e => {
    const label = e.closest('label') || document.querySelector(`label[for="${e.id}"]`);
    const by = e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.alt || e.title;
    return !(by || e.innerText?.trim() || label?.innerText.trim()) && e.getBoundingClientRect().width > 1;
}).map(e => e.outerHTML.slice(0, 120))"""
PALE = """() => {
    const rgb = text => (text.match(/[0-9.]+/g) || []).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(
        v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4
    ).reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
    const behind = e => {
        for (; e; e = e.parentElement) {
            const [r, g, b, a = 1] = rgb(getComputedStyle(e).backgroundColor);
            if (a > .5) return [r, g, b];
        }
        return [255, 255, 255];
    };
    return [...document.querySelectorAll('body *')].filter(e => {
        const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
        const style = getComputedStyle(e), box = e.getBoundingClientRect();
        const hidden = style.visibility === 'hidden' || box.width < 2 || box.height < 2;
        if (!own || e.disabled || hidden) return false;
        const [a, b] = [light(rgb(style.color)), light(behind(e))].sort((x, y) => y - x);
        const large = parseFloat(style.fontSize) >= 24;
        return (a + .05) / (b + .05) < (large ? 3 : 4.5);
    }).map(e => getComputedStyle(e).color + ' ' + e.outerHTML.slice(0, 120));
}"""


@pytest.mark.parametrize("width", [1920, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_and_touched(browser, served, width, scheme):
    options = dict(viewport={"width": width, "height": 900}, color_scheme=scheme)
    with opened(browser, served[1], **options) as page:
        ask(page, SENTENCE)
        shows(page, 12)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        left, right = page.evaluate(
            "() => { const b = document.querySelector('#found').getBoundingClientRect();"
            " return [b.left, document.documentElement.clientWidth - b.right] }"
        )
        assert abs(left - right) <= 2
        assert page.evaluate(OVERFLOWS) == []  # one scroll, that of the page
        assert page.evaluate(SMALL, 44 if width == 400 else 40) == []
        assert page.evaluate(UNNAMED) == []
        assert page.evaluate(PALE) == []


def test_the_keyboard_goes_from_top_to_bottom(tab):
    ask(tab, SENTENCE)
    card(tab, 1).get_by_role("button", name="picture 1 is right").click()
    tab.locator(BOX).first.focus()
    order = []
    for _ in range(40):
        tab.keyboard.press("Tab")
        at = tab.evaluate(
            "() => { const e = document.activeElement, b = e.getBoundingClientRect();"
            " return [e.getAttribute('aria-label') || e.innerText || e.id, b.top + scrollY] }"
        )
        order.append(at)
    names = [name for name, _ in order]
    wanted = ["Search", "Ask again with the marked", "Link to this list", "Save as CSV", "Save as HTML"]
    wanted += ["enlarge picture 1", "picture 1 is right", "picture 1 is wrong", "more like picture 1"]
    wanted += ["enlarge picture 2"]
    assert [names.index(name) for name in wanted] == sorted(names.index(name) for name in wanted)


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
    page.locator(BOX).first.wait_for()
    ask(page, SENTENCE)
    shows(page, 12)
    card(page, 1).get_by_role("button", name="enlarge picture 1").click()
    page.locator("dialog[open] img").wait_for()
    page.keyboard.press("Escape")
    card(page, 2).get_by_text("More like this").click()
    says_(page, "most like")
    assert asked == {served[1].split("/")[2]}
    assert page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 0]
    assert page.evaluate("indexedDB.databases()") == []
    assert page.url == served[1]  # no query in the browser's history
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
    says_(tab, "12 images most like the uploaded image")
    assert "1 · 1.00" in card(tab, 1).inner_text()
    assert "image=uploaded" in link(tab)
    card(tab, 2).get_by_text("More like this").click()
    says_(tab, "most like cam_")
    assert tab.locator("#upload").get_by_text("KB").count() == 0  # it is not asked with any more


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


def test_two_models_beside_each_other(browser, index, tmp_path):
    "The same question to both, differences marked, marks for both."
    from cpcl.search import Index, serve

    run = tmp_path / "run"
    start_run(run, make_config("clip"), {})
    save_encoder(load_encoder(EncoderConfig(pretrained="")), run / "last.safetensors")
    other = Index.build(index.manifest.folder, run, tmp_path / "idx", log=lambda line: None)
    with serve(index, port=0, block=False, beside=other) as page:
        for width in (1920, 400):
            with opened(browser, page.address, viewport={"width": width, "height": 900}) as tab:
                ask(tab, SENTENCE)
                shows(tab, 24)
                a, b = (tab.locator("#found section").nth(i) for i in range(2))
                one, two = (list(i.search(SENTENCE, 12).path) for i in (index, other))
                assert [a.locator(".path").all_inner_texts(), b.locator(".path").all_inner_texts()] == [
                    one,
                    two,
                ]
                assert f"{len(set(one) & set(two))} are in both lists" in tab.locator("#line").inner_text()
                only = a.locator(".hit", has_text="only in A").locator(".path").all_inner_texts()
                assert only == [path for path in one if path not in two] and only
                left, right = a.bounding_box(), b.bounding_box()
                assert left["x"] + left["width"] <= right["x"] and abs(left["y"] - right["y"]) <= 2
                assert tab.evaluate("document.documentElement.scrollWidth") <= width
