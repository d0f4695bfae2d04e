# Everything runs in .venv, which the first target that needs it makes. Python and make are required beforehand, a C++
# compiler for the native kernels, and nvcc for cuda-wheel.

PYTHON ?= python3

# `make test PYTEST_ARGS="-k perturb"`, `make test WORKERS=8`
WORKERS ?= 2
PYTEST_ARGS ?=

DEMO_DIR := demo
DEMO_FLAGS := --data digits --model resnet --epochs 10 --threads 1 --seed 0

# Where there is a compiler, a mistake in csrc has to stop here rather than leave the package without its native
# kernels, as it would elsewhere. `make test GAM_FUSED_NATIVE=0` does without them.
export GAM_FUSED_NATIVE ?= $(if $(shell command -v $${CXX:-c++} 2>/dev/null),1)

VENV := .venv
BIN := $(VENV)/bin
# Written last: without it .venv is half made. pip then starts from an empty one rather than build on the pieces.
INSTALLED := $(VENV)/.installed
# Written when the extensions in gam_fused/ are those of csrc and setup.py.
BUILT := $(VENV)/.built
CPP_SOURCES := $(foreach kind,h cuh inl cpp cu,$(wildcard csrc/*.$(kind) csrc/*/*.$(kind) tests/cuda_host/*.$(kind)))

# The wheel with CUDA kernels is built, and loaded, beside a PyTorch that has CUDA; that takes no GPU.
CUDA_TORCH := torch==2.14.1
CUDA_VENV := .venv-cuda
CUDA_BIN := $(CUDA_VENV)/bin
CUDA_INSTALLED := $(CUDA_VENV)/.installed

OLDEST_TRITON := build/triton-oldest

.PHONY: help demo test test-interpreted support-table build lint format format-check typecheck check cuda-wheel triton-oldest clean distclean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

demo: $(BUILT)  ## train SGD and GAM on digits and compare them
	rm -rf $(DEMO_DIR)
	$(BIN)/gam-fused train $(DEMO_FLAGS) --optimizer sgd --out $(DEMO_DIR)/sgd
	$(BIN)/gam-fused train $(DEMO_FLAGS) --optimizer gam --out $(DEMO_DIR)/gam
	$(BIN)/gam-fused compare $(DEMO_DIR)/sgd $(DEMO_DIR)/gam --out $(DEMO_DIR)/comparison.png

test: $(BUILT)  ## run every test but those that run Triton's kernels in its interpreter
	$(BIN)/python -m pytest -n $(WORKERS) -m "not interpreted" $(PYTEST_ARGS)

test-interpreted: $(BUILT)  ## run those
	$(BIN)/python -m pytest -n $(WORKERS) -m interpreted

support-table: $(BUILT)  ## write docs/support.md anew
	$(BIN)/python -m tests.support.table >docs/support.md

build: $(BUILT)  ## build the extensions

lint: $(INSTALLED)  ## ruff check
	$(BIN)/ruff check .

format: $(INSTALLED)  ## ruff format, the fixes that ruff can make itself, and clang-format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

format-check: $(INSTALLED)  ## ruff format --check, clang-format --dry-run
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)

typecheck: $(INSTALLED)  ## mypy
	$(BIN)/mypy

check: lint format-check typecheck  ## every static check

cuda-wheel: $(CUDA_INSTALLED)  ## build the wheel with CUDA kernels, install it beside a PyTorch with CUDA, load it
	rm -rf dist/cuda
	PATH="$(CURDIR)/$(CUDA_BIN):$$PATH" GAM_FUSED_NATIVE=1 GAM_FUSED_CUDA=1 \
	    $(CUDA_BIN)/python setup.py -q build --build-base build/cuda bdist_wheel --dist-dir dist/cuda
	$(CUDA_BIN)/python -m pip install --disable-pip-version-check -q --no-deps --force-reinstall dist/cuda/*.whl
	cd $(CUDA_VENV) && bin/python -W ignore ../tests/installed.py --cuda

triton-oldest: $(INSTALLED)  ## compile the Triton kernels with the oldest Triton that is supported
	rm -rf $(OLDEST_TRITON)
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --target $(OLDEST_TRITON) triton==3.6.0
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m pytest -n $(WORKERS) tests/test_triton_compile.py tests/second_order/test_triton_compile.py

clean:  ## remove what builds, tests and the demo leave behind
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache $(DEMO_DIR)
	rm -f gam_fused/*.so gam_fused/_native_build.json $(BUILT)
	find $(wildcard benchmarks gam_fused tests) -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## the same, and the virtual environments
	rm -rf $(VENV) $(CUDA_VENV)

$(INSTALLED): pyproject.toml build_backend.py constraints-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "gam-fused needs Python 3.10 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -e $@ || $(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); \
	    echo "Python could not make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@rm -f $@
	GAM_FUSED_NATIVE=0 $(BIN)/python -m pip install --disable-pip-version-check -c constraints-dev.txt -e ".[cli,dev]"
	@touch $@

# Not by pip, which would compile all of csrc again after each change; ninja, from .venv, compiles what changed.
$(BUILT): $(INSTALLED) setup.py gam_fused/_version.py $(filter csrc/%,$(CPP_SOURCES))
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py -q build_ext --inplace
	@touch $@

$(CUDA_INSTALLED): Makefile constraints-dev.txt
	@test -e $@ || $(PYTHON) -m venv --clear $(CUDA_VENV)
	@rm -f $@
	grep -Ev '^(torch|triton)==' constraints-dev.txt >$(CUDA_VENV)/constraints.txt
	$(CUDA_BIN)/python -m pip install --disable-pip-version-check -q -c $(CUDA_VENV)/constraints.txt \
	    $(CUDA_TORCH) setuptools ninja pybind11
	@touch $@
