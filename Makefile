# The two commands: `make search BUDGET=4.25bits` and `make test`. Both set up $(VENV) when it is missing or out of date.

PYTHON ?= python3
VENV   ?= .venv
BUDGET ?= 4.25bits
OUT    ?= aq-out
ARGS   ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help search test lint types unit docs clean

help:
	@echo "make search [BUDGET=4.25bits] [OUT=aq-out] [ARGS='--trials 50 ...']   set up, then aq-search"
	@echo "make test                                                            set up, then lint, types and tests"
	@echo "make lint | types | unit                                             one part of it"
	@echo "make docs                                                            the documentation as a site in build/site"
	@echo "make clean                                                           remove $(VENV), caches and build files"

search: $(VENV)/.installed
	@echo "==> aq-search --budget $(BUDGET) --out $(OUT) $(ARGS)"
	@$(BIN)/aq-search --budget $(BUDGET) --out $(OUT) $(ARGS)

test: lint types unit

lint: $(VENV)/.installed-dev
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	@echo "==> mypy"
	@$(BIN)/mypy -n 2 alphaquant

# Compiled tests are kept, also where Python is told to keep nothing: 10 seconds of each process.
unit: $(VENV)/.installed-dev
	@echo "==> pytest"
	@PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# Pages keep their places, so that links between them are right on GitHub and in the site.
docs: $(VENV)/.installed-docs
	@rm -rf build/docs && mkdir -p build/docs
	@cp -r --parents README.md CONTRIBUTING.md CHANGELOG.md alphaquant/demo/TERMS.md docs benchmarks/*.md benchmarks/results configs/README.md build/docs 2>/dev/null || true
	@$(BIN)/zensical build --strict
	@echo "build/site/index.html"

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"AlphaQuant needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}. Try: make PYTHON=python3.11")'
	@echo "==> virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# torch comes first and by its exact spelling; constraints.txt says why.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> installing torch and the other dependencies (minutes, the first time)"
	@$(PIP) torch==2.13.0
	@$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "==> installing the development tools"
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	@echo "==> installing what builds the documentation"
	@$(PIP) -c constraints.txt -e '.[docs]'
	@touch $@
