"README.md from nbs/index.ipynb: `python tests/readme.py` writes it, tests/test_house.py holds them equal."

import json, re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(((?!https?:|/)[\w./-]+\.(?:ipynb|png|jpg))\)")  # in nbs/, seen from the top level


def readme(root=ROOT):
    "The markdown cells, the visible code cells and their text outputs, in order."
    parts = ["<!-- made from nbs/index.ipynb by `make readme`; edit that -->"]
    for cell in json.loads((root / "nbs/index.ipynb").read_text(encoding="utf8"))["cells"]:
        text = "".join(cell["source"]).strip()
        if not text or text.startswith("#| hide"):
            continue
        if cell["cell_type"] == "markdown":
            parts.append(text)
        elif not text.startswith("#| echo: false"):
            parts.append(f"```python\n{text}\n```")
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            if "text/markdown" in data:
                parts.append("".join(data["text/markdown"]).strip())
            elif "text" in out:
                parts.append("```\n" + "".join(out["text"]).strip() + "\n```")
    return LINK.sub(r"](nbs/\1)", "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf8")
