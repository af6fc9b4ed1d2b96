"A short `setup.py` over `settings.ini` (nbdev's own template does not run on Python 3.11 and later)."

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf8")
cfg = parser["DEFAULT"]
EXTRAS = ("app", "crop", "docs", "export", "heic", "hf", "milvus", "peft", "serve", "trackio", "wandb")
minor = int(cfg["min_python"].split(".")[1])


def needs(*parts):
    "Requirements of `settings.ini`, one per line."
    return [line for part in parts for line in cfg[f"{part}requirements"].splitlines() if line]


class WithTinyClip(build_py):
    "The wheel holds the tiny CLIP, of which `data/tiny-clip` has the only copy in a checkout."

    def run(self):
        super().run()
        if not self.editable_mode:  # an editable install reads the checkout
            for source, copy in self.tiny_clip().items():
                Path(copy).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copy)

    def tiny_clip(self):
        "Each file of the tiny CLIP and its place in the package."
        folder = Path(self.build_lib, "cpcl", "tiny_clip")
        return {str(p): str(folder / p.name) for p in sorted((here / "data" / "tiny-clip").iterdir())}

    def get_outputs(self, include_bytecode=True):
        return [*super().get_outputs(include_bytecode), *self.tiny_clip().values()]


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
    cmdclass={"build_py": WithTinyClip},
    python_requires=f">={cfg['min_python']}",
    install_requires=needs("", "platform_"),
    extras_require={
        **{extra: needs(f"{extra}_") for extra in EXTRAS},
        "dev": needs("dev_", "app_", "crop_", "docs_", "export_", "milvus_", "peft_", "serve_"),
    },
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    classifiers=["License :: OSI Approved :: MIT License", "Development Status :: 3 - Alpha"]
    + [f"Programming Language :: Python :: 3.{m}" for m in range(minor, 14)],
    zip_safe=False,
)
