# Two commands for readers, `make explore` and `make test`; the others are for contributors. `make help` lists them all.
# Written for GNU make 4 and for the 3.81 that macOS ships.

## PYTHON       the interpreter to build .venv with, 3.11 or newer (PYTHON=python3.12)
## TORCH_INDEX  take torch from this package index instead of PyPI, for example for another CUDA version or for the
##              small CPU build: TORCH_INDEX=https://download.pytorch.org/whl/cpu (remembered until .venv is removed)
## ARGS         further options for explore, test, bench and lab: ARGS="--device cpu"
PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
# Exists only while .venv is complete, and holds the TORCH_INDEX that was used.
READY := .venv/.installed
USED_INDEX := $(shell cat $(READY) 2>/dev/null)
TORCH_INDEX ?= $(USED_INDEX)

.DEFAULT_GOAL := help
.PHONY: help explore test check bench gpu-jobs figures lab lint slow browser mutants drift FORCE
# One target at a time, whatever -j says: they share one .venv, and a timing must have the machine to itself.
.NOTPARALLEL:

help:  ## this list
	@echo "attnlab: what sharing key/value heads does to memory, speed and quality."
	@echo "Every command first installs what it needs into .venv (about 2 minutes, once)."
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "Variables, given as in: make explore PYTHON=python3.12"
	@sed -n 's/^## /  /p' Makefile

explore: $(READY)  ## measure this machine, predict, draw (about 4 minutes; after Ctrl-C it continues)
	@$(BIN)/attnlab explore $(ARGS)

test: $(READY)  ## the fast tests
	@$(BIN)/python -m pytest $(ARGS)

check: lint slow browser mutants drift  ## everything slower: lint, slow tests, the page, mutants, drift

bench: $(READY)  ## the pytest-benchmark suites on their quick grid
	@$(BIN)/python -m pytest --benchmark-only $(ARGS)

gpu-jobs: $(READY)  ## what to measure on a CUDA machine: commands, and what is published already
	@$(BIN)/python -m bench.gpu_jobs

figures: $(READY)  ## redraw figures/ from the published rows
	@$(BIN)/attnlab page && $(BIN)/attnlab post && $(BIN)/attnlab figures

lab: $(READY)  ## open the notebooks in JupyterLab
	@$(BIN)/attnlab lab $(ARGS)

lint: $(READY)  ## ruff check, ruff format --check, mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy attnlab

slow: $(READY)  ## the slow tests alone
	@$(BIN)/python -m pytest -m slow

browser: $(READY)  ## the explorer in a real browser; installs Chromium where apt-get may
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c .venv/constraints.txt -e '.[browser]'
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || \
	{ echo "attnlab: error: the page's tests need Chromium: sudo apt-get install chromium" >&2; exit 2; }
	@$(BIN)/python -m pytest -m browser

mutants: $(READY)  ## break the code on purpose, one way at a time: a test must turn red for each
	@$(BIN)/python tests/mutants.py

drift: $(READY)  ## are figures/ byte for byte what the published rows draw?
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && $(BIN)/attnlab page --out "$$fresh/explorer.html" >/dev/null && \
	$(BIN)/attnlab post --out "$$fresh/post.md" >/dev/null && $(BIN)/attnlab figures --out "$$fresh" >/dev/null && \
	if diff -rq figures "$$fresh"; then echo "figures/ is what the published rows draw"; \
	else echo "figures/ is not what the published rows draw: run 'make figures', look at the change, commit it" >&2; exit 1; fi

# Made again when older than what it was made from, or made with another index; removed first, so that an interrupted
# install is taken up again. An index of the user's own need not carry the pinned release of torch, so with one its pin
# and Triton's, which a CUDA build demands to the digit, are dropped and the index decides; the second pip keeps the torch
# it finds and adds what that build depends on.
ifneq ($(TORCH_INDEX),$(USED_INDEX))
$(READY): FORCE
endif
$(READY): pyproject.toml constraints.txt
	@rm -f $@
	@command -v "$(PYTHON)" >/dev/null || \
	{ echo "attnlab: error: no $(PYTHON) on this machine; name a Python 3.11 or newer: make PYTHON=python3.12" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "attnlab: error: Python 3.11 or newer is needed, $(PYTHON) is older; name another: make PYTHON=python3.12" >&2; exit 2; }
	@echo "making .venv"
	@"$(PYTHON)" -m venv .venv
	@cp constraints.txt .venv/constraints.txt
	@if [ -n "$(TORCH_INDEX)" ]; then \
	echo "installing torch from $(TORCH_INDEX)"; \
	grep -Ev '^(torch|triton)==' constraints.txt > .venv/constraints.txt; \
	$(BIN)/python -m pip install -q --disable-pip-version-check --force-reinstall --no-deps --index-url "$(TORCH_INDEX)" 'torch>=2.11'; fi
	@echo "installing attnlab and what it needs, in the versions of constraints.txt (about 2 minutes)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c .venv/constraints.txt -e '.[dev]'
	@echo "$(TORCH_INDEX)" > $@

FORCE:
