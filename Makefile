# Everything works from a fresh clone: each target makes .venv and installs the project when that is missing.
PYTHON ?= $(shell for v in 3.11 3.12 3.13 3.10; do command -v python$$v && break; done || echo python3)
BIN := .venv/bin
NB := $(BIN)/jupyter nbconvert --log-level=ERROR --to notebook --execute --inplace --ExecutePreprocessor.timeout=3600

RELIABLE := tests/test_kill.py tests/test_processes.py tests/test_bad_input.py tests/test_numbers.py tests/test_data.py \
  tests/test_folders.py tests/test_gallery.py tests/test_privacy.py tests/test_machine_code.py tests/test_loaders.py \
  tests/test_command_line.py tests/test_files_of_others.py tests/test_install.py

# they watch signals, locks, other processes or a browser, and get the machine to themselves
ALONE := tests/test_folders.py tests/test_kill.py tests/test_lab.py tests/test_loaders.py tests/test_machine_code.py \
  tests/test_page.py tests/test_privacy.py tests/test_processes.py

PYTHONS ?= $(shell for v in 3.10 3.11 3.12 3.13; do \
  python$$v -c 'import sys; print(sys.executable)' 2>/dev/null || ls -d ~/.pyenv/versions/$$v.*/bin/python 2>/dev/null; done)

.PHONY: install demo test test-all pythons export readme lab docs reliability bench gpu help

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/  -/'

install: .venv/installed ## make .venv and install the project into it

.venv/installed: settings.ini setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --progress-bar on -e '.[dev]'
	touch $@

demo: install ## train on the sample set and print the table (minutes, no GPU)
	$(BIN)/python -m cpcl.cli demo

export XDG_CACHE_HOME := $(CURDIR)/.cache
export NUMBA_CACHE_DIR := $(CURDIR)/.cache/numba
# how users run it: buffered output, modules compiled to files
unexport PYTHONUNBUFFERED PYTHONDONTWRITEBYTECODE
# two test processes of two threads each must not spin beside one another
export OMP_WAIT_POLICY ?= passive

test: install ## what decides whether a change lands
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest tests -n 2 --dist loadfile --durations 10 $(ALONE:%=--ignore=%)
	$(BIN)/python -m pytest $(ALONE) --durations 10
	$(BIN)/nbdev_test --n_workers 2 --timing

test-all: test ## also what is marked slow, the tutorials and the ablation notebooks
	-$(BIN)/python -m pip install -q --only-binary :all: atheris # a guided fuzzer, where it installs; without it its test is skipped
	$(BIN)/python -m pytest tests -m slow
	$(BIN)/nbdev_test --n_workers 2 --flags slow --ignore_fname .never
	CPCL_FAST=1 $(BIN)/jupyter nbconvert --log-level=ERROR --to notebook --execute --stdout nbs/tutorials/five_minutes.ipynb > /dev/null

pythons: install ## the wheel in a complete environment of every Python here (PYTHONS="..."): gigabytes of downloads each
	CPCL_PYTHONS="$(PYTHONS)" $(BIN)/python -m pytest tests/test_install.py -m slow -k every_python -rA

export: install ## notebooks -> package, notebooks cleaned, README written
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tests/readme.py

readme: export

lab: install ## JupyterLab on the notebooks
	$(BIN)/jupyter lab nbs

docs: install ## the documentation site, from the notebooks as they are committed, in _docs/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict -f docs/mkdocs.yml
	@echo "Open _docs/index.html; to search, too: $(BIN)/python -m http.server -d _docs, then http://localhost:8000"

reliability: install ## run every test of the reliability table, the slow ones too, and rewrite its records
	-$(BIN)/python -m pip install -q --only-binary :all: atheris
	mkdir -p runs
	rm -f runs/reliability.json
	CPCL_RECORD=$(CURDIR)/runs/reliability.json $(BIN)/python -m pytest -m "not gpu" $(RELIABLE)
	mv runs/reliability.json nbs/benchmarks/records/
	$(NB) nbs/benchmarks/reliability.ipynb

bench: install ## run the benchmark notebooks and rewrite their records
	CPCL_RUN=1 $(NB) nbs/benchmarks/*.ipynb

gpu: install ## time training, features and labels on a GPU (or, said so, on the processor) and rewrite that record
	rm -f nbs/benchmarks/records/training-$$($(BIN)/python -c 'import torch; print("gpu" if torch.cuda.is_available() else "cpu")').json
	CPCL_RUN=1 $(NB) nbs/benchmarks/training.ipynb
