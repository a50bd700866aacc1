# make help lists the commands; every one of them makes the environment first if it is not there.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3))
BIN := .venv/bin
READY := .venv/.complete
export PYTHONDONTWRITEBYTECODE ?= 1
export TOKENIZERS_PARALLELISM := false
export JUPYTER_PLATFORM_DIRS := 1

.PHONY: help .venv hear run test unit notebooks lab lint readme screenshot measure record lock clean

help: ## this list
	@grep -E '^[a-z.]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv: $(READY) ## the environment alone: uv where it is present, venv and pip where not

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || \
	    { echo "Python 3.11 or 3.12 is needed, $(PYTHON) is neither: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@rm -f $(READY)
	@if command -v uv >/dev/null; then \
	    uv venv --quiet --allow-existing --python $(PYTHON) .venv && \
	    uv pip install --python $(BIN)/python -c constraints.txt -e '.[streaming,notebooks,test]'; \
	else \
	    { $(PYTHON) -m venv .venv || { echo "No venv in $(PYTHON): apt install python3-venv, or install uv" >&2; exit 1; }; } && \
	    $(BIN)/python -m pip install --progress-bar off -c constraints.txt -e '.[streaming,notebooks,test]' | grep -v 'already satisfied'; \
	    exit $${PIPESTATUS[0]}; \
	fi
	@touch $(READY)

hear: $(READY) ## the first sentence, to build/hello.wav
	@mkdir -p build
	$(BIN)/python -m chatterbox_lab speak "Hello there. This sentence was made on your own machine." -o build/hello.wav

run: $(READY) ## executes every notebook with papermill into build/, prints the verdicts
	$(BIN)/python notebooks/run.py

test: unit notebooks ## unit tests, then the notebooks as tests

# Two processes of one thread each: tests are too small to share two threads, which then wait for one another.
unit: $(READY) ## the unit tests alone
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist worksteal

notebooks: $(READY) ## the notebooks as tests: their outputs are compared with the committed ones
	CHATTERBOX_LAB_OUTPUT=$(CURDIR)/build/test $(BIN)/python -m pytest -p no:cacheprovider --timeout=1800 \
	    --nbval --nbval-sanitize-with tests/nbval.cfg notebooks

lab: $(READY) ## opens JupyterLab
	$(BIN)/jupyter lab notebooks

lint: $(READY) ## ruff, notebooks included
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

readme: $(READY) ## fills the tables of README.md from data/
	$(BIN)/python notebooks/readme.py

screenshot: $(READY) ## draws the README's picture of the explorer (Chromium needed)
	CHATTERBOX_LAB_SCREENSHOT=$(CURDIR)/figures/03_explorer.png $(BIN)/python -m pytest tests/show/test_browser.py

DEVICE ?= auto
MODEL ?= random
measure: $(READY) ## measures this machine, DEVICE=cuda or cpu, part by part, into build/data/; again goes on
	$(BIN)/python -m chatterbox_lab measure --device $(DEVICE) --model $(MODEL)

record: $(READY) ## records again what other transformers versions do (downloads them)
	$(BIN)/python -m chatterbox_lab releases

lock: $(READY) ## writes constraints.txt from the environment
	@mkdir -p build && set -o pipefail && $(BIN)/python -m pip freeze --all --exclude pip --exclude-editable | \
	    grep -E '^[A-Za-z0-9_.-]+==' > build/constraints.txt && mv build/constraints.txt . && touch $(READY)

clean: ## removes the environment and what runs leave behind
	rm -rf .venv build *.egg-info .ruff_cache
