# Everything runs in .venv, which the first target that needs it makes. Only Python and make are required beforehand.

PYTHON ?= python3

# `make test PYTEST_ARGS="-k perturb"`, `make test WORKERS=8`
WORKERS ?= 2
PYTEST_ARGS ?=

DEMO_DIR := demo
DEMO_FLAGS := --data digits --model resnet --epochs 10 --threads 1 --seed 0

VENV := .venv
BIN := $(VENV)/bin
# Written last: without it .venv is half made. pip then starts from an empty one rather than build on the pieces.
INSTALLED := $(VENV)/.installed

.PHONY: help demo test lint format format-check typecheck check clean distclean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

demo: $(INSTALLED)  ## train SGD and GAM on digits and compare them
	rm -rf $(DEMO_DIR)
	$(BIN)/gam-fused train $(DEMO_FLAGS) --optimizer sgd --out $(DEMO_DIR)/sgd
	$(BIN)/gam-fused train $(DEMO_FLAGS) --optimizer gam --out $(DEMO_DIR)/gam
	$(BIN)/gam-fused compare $(DEMO_DIR)/sgd $(DEMO_DIR)/gam --out $(DEMO_DIR)/comparison.png

test: $(INSTALLED)  ## run every test
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

lint: $(INSTALLED)  ## ruff check
	$(BIN)/ruff check .

format: $(INSTALLED)  ## ruff format, and the fixes that ruff can make itself
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

format-check: $(INSTALLED)  ## ruff format --check
	$(BIN)/ruff format --check .

typecheck: $(INSTALLED)  ## mypy
	$(BIN)/mypy

check: lint format-check typecheck  ## every static check

clean:  ## remove what builds, tests and the demo leave behind
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache $(DEMO_DIR)
	find $(wildcard benchmarks gam_fused tests) -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## the same, and .venv
	rm -rf $(VENV)

$(INSTALLED): pyproject.toml setup.py constraints-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "gam-fused needs Python 3.10 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -e $@ || $(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); \
	    echo "Python could not make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@rm -f $@
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints-dev.txt -e ".[cli,dev]"
	@touch $@
