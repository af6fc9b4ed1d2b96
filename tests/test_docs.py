"The documentation site: built as `make docs` builds it, checked as files, then looked at in Chromium."

import functools, json, os, re, shutil, subprocess, sys, threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

from readme import ROOT

pytest.importorskip("mkdocs", reason="the site needs the extra [docs]")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
PAGES = [p.relative_to(ROOT / "nbs").with_suffix(".html").as_posix() for p in NOTEBOOKS]
LOOKED_AT = [
    "index.html",
    "60_losses.html",  # equations
    "tutorials/five_minutes.html",  # pictures
    "30_cluster/index.html",
    next(p for p in PAGES if p.startswith("30_cluster/")),  # code and text outputs
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The folder of the built site."
    out = tmp_path_factory.mktemp("docs") / "site"
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--quiet",
        "--strict",
        "-f",
        "docs/mkdocs.yml",
        "-d",
        out,
    ]
    env = os.environ | dict(NO_MKDOCS_2_WARNING="1")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


class Page(HTMLParser):
    "The anchors, links and loaded files of a page, and the text of its content."

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loads, self.text, self.depth = set(), set(), set(), [], 0
        self.feed(path.read_text(encoding="utf8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors.add(attributes.get("id"))
        self.depth += tag == "article" and (
            self.depth > 0 or "md-content__inner" in attributes.get("class", "")
        )
        if tag == "a" and attributes.get("href"):
            self.links.add(attributes["href"])
        if tag == "link" and attributes.get("rel") not in ("prev", "next", "canonical"):
            self.loads.add(attributes["href"])
        if tag in ("img", "script", "iframe", "source", "video") and attributes.get("src"):
            self.loads.add(attributes["src"])

    def handle_endtag(self, tag):
        self.depth -= tag == "article" and self.depth > 0

    def handle_data(self, data):
        self.text += [data] if self.depth else []


@pytest.fixture(scope="module")
def pages(site):
    "name -> parsed page, of the whole site."
    return {p.relative_to(site).as_posix(): Page(p) for p in site.rglob("*.html") if p.name != "404.html"}


def test_every_notebook_is_a_page(pages):
    assert set(PAGES) <= set(pages)
    front = {unquote(link) for link in pages["index.html"].links}
    assert set(PAGES) - {"index.html"} <= front, "the navigation lacks a notebook"
    folders = {p.parent.name for p in NOTEBOOKS} - {"nbs"}
    assert {f"{folder}/index.html" for folder in folders} <= front, "the navigation lacks a folder"


def test_titles_and_promises(pages):
    for notebook, page in zip(NOTEBOOKS, PAGES):
        first = "".join(json.loads(notebook.read_text(encoding="utf8"))["cells"][0]["source"])
        title = re.sub(r"[`*$]", "", re.search(r"^# +(.+)", first, re.M)[1])
        assert title.strip() in "".join(pages[page].text), f"{page} lacks its title"


def test_links_lead_somewhere(site, pages):
    dead = []
    for name, page in pages.items():
        for link in page.links | page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            there = (site / name).parent / unquote(parts.path) if parts.path else site / name
            there = there.resolve()
            found = there.is_file() or (there / "index.html").is_file()
            if found and parts.fragment and there.suffix == ".html":
                found = unquote(parts.fragment) in pages[there.relative_to(site.resolve()).as_posix()].anchors
            dead += [] if found else [f"{name} -> {link}"]
    assert not dead


def test_nothing_is_loaded_from_another_host(pages):
    for name, page in pages.items():
        assert not [link for link in page.loads if re.match(r"(https?:)?//", link)], name


def test_directives_and_hidden_cells_do_not_show(pages):
    for notebook, name in zip(NOTEBOOKS, PAGES):
        text = "".join(pages[name].text)
        assert not re.search(r"^#\|", text, re.M), f"{name} shows a directive"
        for cell in json.loads(notebook.read_text(encoding="utf8"))["cells"]:
            source = "".join(cell["source"])
            if source.startswith("#| hide\n") and len(code := source.removeprefix("#| hide\n").strip()) > 60:
                assert code not in text, f"{name} shows a hidden cell"


def test_one_cell_of_each_kind():
    "Directives, links, equations, tables and outputs of a made-up notebook."
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from notebooks import Writer
    finally:
        sys.path.pop(0)
    known = {"nbs/10_a/00_b.ipynb": "10_a/00_b.html", "nbs/20_c.ipynb": "20_c.html"}
    writer = Writer("nbs/10_a/00_b.ipynb", known, "a.b")

    def code(source, *outputs):
        return writer.cell(dict(cell_type="code", source=source, outputs=list(outputs)))

    def stream(text, name="stdout"):
        return dict(output_type="stream", name=name, text=text)

    assert code("#| hide\nsecret", stream("secret")) == code("#| default_exp a.b") == ""
    assert "secret" not in (shown := code("#| echo: false\nsecret", stream("printed"))) and "printed" in shown
    assert 'class="cell exported"' in (shown := code("#| export\nx = 1")) and "export</" not in shown
    assert "data-search-exclude" in code("assert True")
    assert code("x", stream("0%\r50%\rdone \x1b[31mred\x1b[0m")).endswith(">done red</pre></section>")
    assert "warning" not in code("x", stream("warning", "stderr"))
    table = dict(data={"text/html": '<style scoped>a {}</style><table border="1" class="dataframe"></table>'})
    assert "<table></table>" in (shown := code("x", table)) and "style" not in shown
    picture = dict(data={"image/png": "aGVsbG8=", "text/plain": "<Figure>"})
    assert (
        'src="00_b_files/0.png"' in code("x", picture) and writer.assets["10_a/00_b_files/0.png"] == b"hello"
    )

    assert 'href="../20_c.html#a-heading"' in writer.text("[x](../20_c.ipynb#A-Heading)")
    assert writer.text("`20_c`, `nbs/20_c.ipynb`, `c`").count("<a ") == 2
    assert r'<span class="math">\(a &lt; b\)</span>' in writer.text("$a < b$")
    assert '<div class="math">' in writer.text("$$\na\n$$") and writer.math
    assert 'href="../files/LICENSE"' in writer.text("[licence](LICENSE)")


# ------------------------------------------------------------------------------------------ in the browser


@pytest.fixture(scope="module")
def address(site):
    "Where a local web server answers with the site."

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="looking at the site needs playwright")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, address):
    "Opens pages at a width; in the end no other host may have been asked, and no script may have failed."
    page, asked, failed = browser.new_page(), [], []
    page.set_default_timeout(20_000)
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failed.append(str(error)))

    def open_page(name, width=1100):
        page.set_viewport_size(dict(width=width, height=900))
        page.goto(address + name)
        return page

    yield open_page
    page.close()
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not failed


def test_equations_are_drawn(tab):
    page = tab("60_losses.html")
    page.wait_for_function("() => document.querySelectorAll('mjx-container svg').length > 3")
    sizes = page.evaluate("[...document.querySelectorAll('mjx-container svg')].map(e => e.clientWidth)")
    assert min(sizes) > 3 and max(sizes) > 60
    assert page.locator("[data-mjx-error]").count() == 0
    assert page.locator("span.math, div.math").count() == len(sizes)


@pytest.mark.parametrize("name", LOOKED_AT)
def test_code_is_not_cut_off_at_1100(tab, name):
    page = tab(name, 1100)
    blocks = page.evaluate(
        """[...document.querySelectorAll('.md-content pre > code')].map(e => ({
            columns: Math.max(...e.innerText.split('\\n').map(line => line.length)),
            cut: e.scrollWidth > e.clientWidth + 1, size: parseFloat(getComputedStyle(e).fontSize)}))"""
    )
    assert blocks
    assert not [b for b in blocks if b["cut"] and b["columns"] <= 110]
    assert min(b["size"] for b in blocks) >= 12


@pytest.mark.parametrize("name", LOOKED_AT)
def test_a_phone_shows_it_all(tab, name):
    page = tab(name, 400)
    page.wait_for_load_state("networkidle")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    beyond = page.evaluate(
        """[...document.querySelectorAll('.md-content__inner > *')]
            .filter(e => e.getBoundingClientRect().right > 401).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert not beyond
    assert (
        page.locator(".md-content__inner > p").first.evaluate("e => parseFloat(getComputedStyle(e).fontSize)")
        >= 13
    )


def test_pictures_are_there(tab):
    page = tab("tutorials/five_minutes.html", 1920)
    count = page.locator(".md-content img").count()
    assert count > 3
    for at in range(count):
        page.locator(".md-content img").nth(at).scroll_into_view_if_needed()
    page.wait_for_function("() => [...document.images].every(e => e.complete && e.naturalWidth > 100)")


def test_search_finds_dbscan(tab):
    page = tab("index.html", 1920)
    page.locator(".md-search__input").fill("DBSCAN")
    page.locator(".md-search-result__link").first.wait_for()
    found = page.locator(".md-search-result__link").evaluate_all("links => links.map(e => e.pathname)")
    assert any("/30_cluster/" in path for path in found)
    page.locator(".md-search-result__link").first.click()
    page.wait_for_function("() => location.pathname !== '/index.html'")
