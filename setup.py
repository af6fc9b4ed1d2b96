"A short `setup.py` over `settings.ini` (nbdev's own template does not run on Python 3.11 and later)."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf8")
cfg = parser["DEFAULT"]
minor = int(cfg["min_python"].split(".")[1])

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf8")
    if (here / "README.md").exists()
    else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="MIT",
    keywords=cfg["keywords"],
    packages=find_packages(include=["cpcl", "cpcl.*"]),
    package_data={"cpcl.synth": ["styles/*.json"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split() + cfg["platform_requirements"].split(),
    extras_require={
        e: " ".join(cfg[f"{p}_requirements"] for p in parts).split()
        for e, parts in {
            "app": ["app"],
            "crop": ["crop"],
            "docs": ["docs"],
            "export": ["export"],
            "heic": ["heic"],
            "milvus": ["milvus"],
            "peft": ["peft"],
            "dev": ["dev", "app", "crop", "docs", "export", "milvus", "peft"],
        }.items()
    },
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    classifiers=["License :: OSI Approved :: MIT License", "Development Status :: 3 - Alpha"]
    + [f"Programming Language :: Python :: 3.{m}" for m in range(minor, 14)],
    zip_safe=False,
)
