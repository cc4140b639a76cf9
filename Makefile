# `make` alone lists what it can do. Everything runs in .venv, made with $(PYTHON), and installed again only when setup.py
# or the pinned versions change.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints-cpu.txt -e
# Some tests wait, some compute on two ranks: a test for each core at a time, as long as memory lasts.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal
INPUTS := setup.py pyproject.toml constraints-cpu.txt

.DEFAULT_GOAL := help
.PHONY: help test test-slow check demo clean layout-report
.DELETE_ON_ERROR:

# pytest-timeout interrupts Python. A test that hangs in a library's C code for so many seconds ends with its process,
# which says where every thread was.
ended-after = -o faulthandler_timeout=$(1) -o faulthandler_exit_on_timeout=true

# A target is listed with what stands after its `##`.
help: ## this list
	@echo "usage: make TARGET [PYTHON=python3.12] [VENV=.venv]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# One thread per process unless told otherwise: the tests start several processes.
test test-slow: export OMP_NUM_THREADS ?= 1
test: $(VENV)/.installed-test ## the CPU suite, about 12 minutes on two cores
	$(PYTEST) -ra --durations=10 -m "not slow" $(call ended-after,400)

test-slow: $(VENV)/.installed-test ## what `make test` leaves out: four ranks, long forms
	$(PYTEST) -ra --durations=10 -m slow $(call ended-after,1200)

check: $(VENV)/.installed-check ## lint, types, unit tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(PYTEST) -q tests/unit

layout-report: export OMP_NUM_THREADS ?= 1
layout-report: $(VENV)/.installed-test ## writes docs/layouts.md: gradient errors against the reference, by layout
	$(BIN)/python tests/layout_report.py

demo: $(VENV)/.installed-demo ## clones a real teacher, end to end: about 10 minutes, plus downloads
	PYTHON=$(abspath $(BIN)/python) bash examples/demo/run.sh

$(VENV)/.installed-test: $(INPUTS) | $(BIN)/python
	@echo "installing megatron_lrc and its test dependencies into $(VENV) (a few minutes the first time)"
	$(INSTALL) '.[test]'
	@touch $@

$(VENV)/.installed-check: $(VENV)/.installed-test
	$(INSTALL) '.[test,check]'
	@touch $@

$(VENV)/.installed-demo: $(INPUTS) | $(BIN)/python
	@echo "installing megatron_lrc and the demo's dependencies into $(VENV) (a few minutes the first time)"
	$(INSTALL) '.[demo]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1); megatron_lrc needs Python 3.10 or newer." \
	            "Use make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "error: $(PYTHON) cannot make virtual environments; install its venv package (Debian: python3-venv)." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

clean: ## removes the environment and caches, keeps demo/ and runs/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
