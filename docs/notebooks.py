"""The notebooks as pages: hooks of mkdocs (see `mkdocs.yml` beside this file), run by `make docs`.

Every notebook below nbs/ becomes a page and every folder a section, so a new notebook needs no entry.
Outputs are those committed; nothing is executed. Hidden cells and nbdev's directives are not shown.
A link that leads nowhere is logged as a warning, which `--strict` makes an error.
"""

import ast, base64, html, json, logging, re
from dataclasses import dataclass, field
from importlib.resources import files as package_files
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mkdocs.structure.files import File
from mkdocs.structure.toc import get_toc
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_by_name
from pygments.util import ClassNotFound

from cpcl.files import claimed

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
# what has no number, in reading order; what is not listed comes after it, by name
UNNUMBERED = ["five_minutes", "change_a_loss"]
UNNUMBERED += ["search", "hub", "synth", "lab", "cli", "tutorials", "ablations", "benchmarks"]
TITLES = {
    "cli": "Command line",
    "eval": "Evaluation",
    "synth": "Drawn people",
    "train": "Training",
    "viz": "Figures",
}
PROJECT = ["CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
EXPORT, HIDDEN = {"export", "exporti", "exports"}, {"hide", "default_exp"}

log = logging.getLogger("mkdocs.hooks.notebooks")


@dataclass
class Content:
    "A page without the theme."

    title: str
    summary: str
    html: str
    toc: list  # mkdocs' tokens of a table of contents
    assets: dict = field(default_factory=dict)  # path in the site -> bytes


# ------------------------------------------------------------------------------------------ the folder tree


def order(path):
    "Sort key of a folder or notebook: the front page, then numbers, then the order of `UNNUMBERED`."
    if path.stem == "index":
        return 0, 0, ""
    if number := re.match(r"\d+", path.stem):
        return 1, int(number[0]), path.stem
    return 2, (UNNUMBERED + [path.stem]).index(path.stem), path.stem


def entries(folder):
    "The notebooks of a folder and its folders that hold notebooks, in reading order."
    found = [p for p in folder.iterdir() if p.suffix == ".ipynb" or (p.is_dir() and any(p.glob("*.ipynb")))]
    return sorted((p for p in found if not p.name.startswith((".", "_"))), key=order)


def notebooks(folder):
    "All notebooks below a folder, in reading order."
    for path in entries(folder):
        yield from notebooks(path) if path.is_dir() else [path]


def source_of(path):
    "A file's name in the repository, such as `nbs/30_cluster/02_jaccard.ipynb`."
    return path.relative_to(ROOT).as_posix()


def address_of(source):
    "The address in the site of a notebook or a page of the project."
    if source.startswith("nbs/"):
        return source.removeprefix("nbs/").removesuffix(".ipynb") + ".html"
    return f"project/{Path(source).stem.lower()}.html"


def read_cells(path):
    return json.loads(path.read_text(encoding="utf8"))["cells"]


def heading_of(cells, default):
    "(title, promise) of a notebook, from its first markdown cell."
    text = next(("".join(c["source"]) for c in cells if c["cell_type"] == "markdown"), "")
    title, promise = re.search(r"^# +(.+)", text, re.M), re.search(r"^> *(.+(?:\n> ?.+)*)", text, re.M)
    return (title[1].strip() if title else default), (re.sub(r"\n> ?", " ", promise[1]) if promise else "")


# ------------------------------------------------------------------------------------------ one page


class Writer:
    "Renders the cells of one page; collects its table of contents and the files it needs."

    def __init__(
        self,
        source,  # name in the repository, which links start from
        known,  # source -> address of every page
        module="",  # the module that the notebook makes, if any
    ):
        self.source, self.known, self.module = source, known, module
        self.address = known.get(source) or address_of(source)
        self.toc, self.assets, self.anchors, self.math = [], {}, set(), False
        self.markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])  # as JupyterLab reads it
        self.markdown.use(dollarmath_plugin, double_inline=True)
        rules = self.markdown.renderer.rules
        rules |= {name: self.equation for name in ("math_inline", "math_inline_double", "math_block")}
        rules |= {name: self.fence for name in ("fence", "code_block")}

    def page(self, parts, title, summary=""):
        "The page of rendered parts."
        body = "\n".join(filter(None, parts))
        if self.math:
            body += "".join(
                f'\n<script defer src="{self.here(f)}"></script>' for f in ("math.js", "mathjax.js")
            )
        return Content(title, summary, body, nested(self.toc), self.assets)

    def here(self, address):
        "An address as seen from this page."
        return relpath(address, dirname(self.address) or ".")

    # markdown

    def text(self, source):
        "Markdown as HTML."
        tokens = self.markdown.parse(source)
        for at, token in enumerate(tokens):
            for inner in token.children or [token]:
                self.redirect(inner)
            if token.children:
                token.children = list(self.with_links(token.children))
            if token.type == "heading_open":
                self.heading(token, tokens[at + 1])
        return self.markdown.renderer.render(tokens, self.markdown.options, {})

    def heading(self, token, inline):
        "Give a heading an anchor, a permanent link and a line in the table of contents."
        name = "".join(t.content for t in inline.children if t.type in ("text", "code_inline", "math_inline"))
        name = name or "Section"
        anchor = slug(name)
        while anchor in self.anchors:
            anchor += "-"
        self.anchors.add(anchor)
        token.attrSet("id", anchor)
        link = f'<a class="headerlink" href="#{anchor}" title="Link to this section">¶</a>'
        inline.children.append(Token("html_inline", "", 0, content=link))
        self.toc.append(dict(level=int(token.tag[1]), id=anchor, name=html.escape(name), children=[]))

    def equation(self, tokens, at, *_):
        self.math = True
        tag, opens, closes = (
            ("span", r"\(", r"\)") if tokens[at].type == "math_inline" else ("div", r"\[", r"\]")
        )
        return f'<{tag} class="math">{opens}{html.escape(tokens[at].content)}{closes}</{tag}>'

    def fence(self, tokens, at, *_):
        return code_html(tokens[at].content, tokens[at].info)

    # links

    def redirect(self, token):
        "Make the links and pictures of a token lead to what they name, seen from this page."
        for name in ("href", "src"):
            if token.attrGet(name):
                token.attrSet(name, self.target(token.attrGet(name), name))
        if token.type in ("html_inline", "html_block"):
            attribute = r'\b(href|src|srcset)="([^"]+)"'
            token.content = re.sub(attribute, lambda m: f'{m[1]}="{self.target(m[2], m[1])}"', token.content)

    def target(self, link, attribute):
        """The address that replaces a link.

        Notebooks and the project's texts are pages; any other file of the repository is copied to `files/`.
        """
        if re.match(r"https?:", link) and attribute != "href":
            log.warning("%s shows %s, which is on another host", self.source, link)
        if re.match(r"[a-z]+:|#|//", link):
            return link
        path, _, anchor = link.partition("#")
        for base in (dirname(self.source), ""):  # the front page is also the README, which is at the top
            there = normpath(join(base, path))
            if there in self.known:
                return self.here(self.known[there]) + (anchor and "#" + slug(anchor))
            if not there.startswith("..") and (ROOT / there).is_file():
                self.assets[f"files/{there}"] = (ROOT / there).read_bytes()
                return self.here(f"files/{there}")
        log.warning("%s links to %s, which does not exist", self.source, link)
        return link

    def with_links(self, tokens):
        "The tokens; inline code that names a notebook becomes a link to it."
        inside = 0
        for token in tokens:
            inside += (token.type == "link_open") - (token.type == "link_close")
            named = self.named(token.content) if token.type == "code_inline" and not inside else None
            if named:
                link = (
                    f'<a href="{self.here(self.known[named])}"><code>{html.escape(token.content)}</code></a>'
                )
                token = Token("html_inline", "", 0, content=link)
            yield token

    def named(self, code):
        "The notebook that inline code names, such as `30_cluster/02_jaccard`, or None."
        name = code.removeprefix("nbs/").removesuffix(".ipynb")
        if not re.fullmatch(r"[\w/]*[/_]\w+", name):  # a single word is rather a name in the code
            return None
        places = [join(dirname(self.source), f"{name}.ipynb"), f"nbs/{name}.ipynb"]
        places += [source for source in self.known if source.endswith(f"/{name}.ipynb")]
        found = next((p for p in places if p in self.known), None)
        return found if found != self.source else None

    # cells

    def cell(self, cell):
        "A cell as HTML; empty if it is hidden."
        directives, source = split_directives("".join(cell["source"]))
        names = {d.split(":")[0].split()[0] for d in directives if d}
        off = {d.split(":")[0] for d in directives if d.endswith("false")}
        if names & HIDDEN or "include" in off or cell["cell_type"] == "raw":
            return ""
        if cell["cell_type"] == "markdown":
            return self.text(source)
        show_code = source.strip() and "hide_input" not in names and "echo" not in off
        show_output = "hide_output" not in names and "output" not in off
        parts = [code_html(source, "python")] if show_code else []
        parts += map(self.output, cell["outputs"]) if show_output else []
        if not any(parts):
            return ""
        exported = " exported" if names & EXPORT else ""
        quiet = " data-search-exclude" if self.module and not exported else ""  # a search finds no tests
        return f'<section class="cell{exported}"{quiet}>{"".join(parts)}</section>'

    def output(self, out):
        "An output as HTML: a picture, a table, markdown or text. Progress bars and warnings are left out."
        data = out.get("data") or {"text/plain": out.get("text") or out.get("traceback") or ""}
        if out.get("name") == "stderr" or any("widget" in kind for kind in data):
            return ""
        for kind, suffix in {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg"}.items():
            if kind in data:
                return self.picture("".join(data[kind]), suffix)
        if "text/markdown" in data:
            return f'<article class="output">{self.text("".join(data["text/markdown"]))}</article>'
        if "text/html" in data:
            table = plain_table("".join(data["text/html"]))
            return f'<article class="output" data-search-exclude>{table}</article>'
        text = plain_text("".join(data.get("text/plain", "")))
        return f'<pre class="output" data-search-exclude>{html.escape(text)}</pre>' if text else ""

    def picture(self, data, suffix):
        "A picture, kept in a file beside the page."
        name = f"{self.address.removesuffix('.html')}_files/{len(self.assets)}.{suffix}"
        self.assets[name] = data.encode() if suffix == "svg" else base64.b64decode(data)
        return f'<p class="output"><img src="{self.here(name)}" alt="Figure" loading="lazy"></p>'


def slug(text):
    "The anchor of a heading."
    return re.sub(r"\W+", "-", text.lower()).strip("-") or "section"


def nested(flat):
    "Tokens of headings, each among the children of the heading that it stands below."
    top, above = [], []
    for token in flat:
        while above and above[-1]["level"] >= token["level"]:
            above.pop()
        (above[-1]["children"] if above else top).append(token)
        above.append(token)
    return top


def split_directives(source):
    "(nbdev's directives without `#|`, the source without them)."
    lines = source.splitlines()
    directives = [line[2:].strip() for line in lines if line.startswith("#|")]
    return directives, "\n".join(line for line in lines if not line.startswith("#|"))


def code_html(code, language):
    "A highlighted block of code."
    try:
        lexer = get_lexer_by_name(language.strip() or "text")
    except ClassNotFound:
        lexer = TextLexer()
    return highlight(code.rstrip(), lexer, HtmlFormatter(cssclass="highlight", wrapcode=True))


def plain_table(text):
    "A pandas table without its own style, so that it takes the site's."
    text = re.sub(r"<style.*?</style>", "", text, flags=re.S)
    return text.replace('<table border="1" class="dataframe">', "<table>")


def plain_text(text):
    "Text without colours; of a line that was overwritten, the last version."
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return "\n".join(line.rstrip("\r").split("\r")[-1] for line in text.split("\n")).rstrip()


# ------------------------------------------------------------------------------------------ all pages


def notebook_page(path, known):
    "The page of a notebook."
    cells = read_cells(path)
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    module = next((m[1] for c in code if (m := re.match(r"#\| *default_exp +(\S+)", c))), "")
    writer = Writer(source_of(path), known, module)
    parts = [writer.cell(cell) for cell in cells]
    if writer.source != "nbs/index.ipynb":
        made = f" · code with a coloured edge is exported to <code>cpcl.{module}</code>" if module else ""
        origin = f"Notebook <code>{writer.source}</code>{made}"
        parts.insert(1, f'<p class="origin" data-search-exclude>{origin}</p>')
    return writer.page(parts, *heading_of(cells, path.stem))


def package_of(folder):
    "The package that a folder's notebooks make: 30_cluster -> cluster."
    return re.sub(r"^\d+_", "", folder.name)


def front_door(folder):
    "(docstring, public names) of the package that a folder's notebooks make, if they make one."
    path = ROOT / "cpcl" / package_of(folder) / "__init__.py"
    if not path.is_file():
        return "", []
    tree = ast.parse(path.read_text(encoding="utf8"))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    calls = [call for call in calls if getattr(call.func, "id", "") == "front_door"]
    offered = [ast.literal_eval(keyword.value) for call in calls for keyword in call.keywords]
    return ast.get_docstring(tree) or "", sorted(" ".join(offered).split())


def folder_page(folder, known):
    "What a folder holds: its notebooks with their promises, and what its front door offers."
    name = package_of(folder)
    title, (summary, names) = TITLES.get(name, name.capitalize()), front_door(folder)
    parts = [f"# {title}", f"> {summary}" if summary else ""]
    for path in entries(folder):
        heading, promise = heading_of(read_cells(path), path.stem)
        parts.append(f"**[{heading}]({path.name})**  \n{promise}")
    if names:
        lines = [f"from cpcl.{name} import (", *(f"    {n}," for n in names), ")"]
        parts += ["## Front door", "```python\n" + "\n".join(lines) + "\n```"]
    writer = Writer(f"{source_of(folder)}/index.ipynb", known)
    return writer.page([writer.text("\n\n".join(filter(None, parts)))], title, summary)


def project_page(name, known):
    "A markdown file from the top of the repository."
    text = (ROOT / name).read_text(encoding="utf8")
    writer = Writer(name, known)
    return writer.page([writer.text(text)], heading_of([dict(cell_type="markdown", source=text)], name)[0])


def site():
    "(address -> content of all pages, navigation as mkdocs takes it)."
    project = [name for name in PROJECT if (ROOT / name).is_file()]
    known = {s: address_of(s) for s in [*map(source_of, notebooks(NBS)), *project]}
    folders = [source_of(path) for path in entries(NBS) if path.is_dir()]
    known |= {folder: address_of(f"{folder}/index.ipynb") for folder in folders}
    pages = {}

    def listed(folder):
        "The navigation below a folder; makes its pages."
        nav = []
        for path in entries(folder):
            if path.is_dir():
                index = address_of(f"{source_of(path)}/index.ipynb")
                pages[index] = folder_page(path, known)
                nav.append({pages[index].title: [index, *listed(path)]})
            else:
                address = known[source_of(path)]
                pages[address] = notebook_page(path, known)
                nav.append({"Home" if address == "index.html" else pages[address].title: address})
        return nav

    nav = listed(NBS)
    pages |= {known[name]: project_page(name, known) for name in project}
    nav.append({"Project": [{pages[known[name]].title: known[name]} for name in project]})
    return pages, nav


# ------------------------------------------------------------------------------------------ mkdocs

made = {}  # mkdocs' name of a page, such as 40_oplm.md -> its content


def _is_site(folder):
    "Whether mkdocs made a folder before there were marks."
    index = Path(folder) / "index.html"
    return index.is_file() and 'name="generator" content="mkdocs' in index.read_text(
        encoding="utf8", errors="replace"
    )


def on_config(config):
    "Read the notebooks and lay out the navigation."

    def renamed(nav):
        if isinstance(nav, str):
            return nav.removesuffix(".html") + ".md"
        if isinstance(nav, list):
            return [renamed(item) for item in nav]
        return {title: renamed(item) for title, item in nav.items()}

    with claimed(config.site_dir, "docs", _is_site, [ROOT, NBS], "site_dir"):
        pass  # mkdocs empties it
    pages, nav = site()
    made.clear()
    made.update({renamed(address): content for address, content in pages.items()})
    config.nav = renamed(nav)
    return config


def on_files(files, config):
    "Add the pages, their pictures and MathJax to the files of the site."
    assets = {path: data for content in made.values() for path, data in content.assets.items()}
    mathjax = package_files("mathjax") / "static/mathjax/es5/tex-svg.js"
    assets["mathjax.js"] = mathjax.read_bytes()
    for path, data in (dict.fromkeys(made, "") | assets).items():
        files.append(File.generated(config, path, content=data))
    return files


def on_page_markdown(markdown, page, config, files):
    "The promise of a notebook describes its page to search engines."
    page.meta["description"] = re.sub(r"[`*_$]", "", made[page.file.src_uri].summary)
    return markdown


def on_page_content(text, page, config, files):
    "Put the page that was made from the notebook in the place of the empty one."
    content = made[page.file.src_uri]
    page.toc = get_toc(content.toc)
    return content.html
