# make demo   runs the main job on a real model       (installs only what that needs)
# make test   lints, type-checks and runs all tests   (installs everything that the tests exercise)
# make test-neural-compressor  tests the engine neural-compressor, in an environment with it
# make test-sparse-emulated    tests sparse inference of TFLite, in an emulated processor that has it (qemu-user)
# make bench  prints the figures of benchmarks/       (slow)
#
# PYTHON names the interpreter (3.11 or newer), NC_PYTHON the one for neural-compressor (3.9 to 3.12), PIP_FLAGS adds
# options for pip, such as the index of PyTorch's CPU builds.

PYTHON ?= python3
# numpy 1.26, the last one it runs with, has no wheels for newer ones.
NC_PYTHON ?= $(PYTHON)
PIP_FLAGS ?=
VENV := .venv
DEMO_VENV := .venv-demo
NC_VENV := .venv-neural-compressor
BIN := $(VENV)/bin

.PHONY: demo test test-neural-compressor test-sparse-emulated lint bench clean help
.DEFAULT_GOAL := help

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

$(VENV)/.stamp: EXTRA := dev
$(DEMO_VENV)/.stamp: EXTRA := eval,tflite

# The stamp is older than what the environment was made from: a changed pin or dependency makes it anew.
%/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "onnxprune needs Python 3.11 or newer. Name one: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --disable-pip-version-check --no-input -q $(PIP_FLAGS) -c constraints.txt -e '.[$(EXTRA)]'
	@touch $@

# numpy < 2, so it can be no extra of ours. Version 1.0 names neither scipy nor prettytable, and imports both.
$(NC_VENV)/.stamp: constraints-neural-compressor.txt
	$(NC_PYTHON) -m venv $(NC_VENV)
	$(NC_VENV)/bin/python -m pip install --disable-pip-version-check --no-input -q $(PIP_FLAGS) -c $< onnx-neural-compressor==1.0 scipy prettytable
	@touch $@

demo: $(DEMO_VENV)/.stamp
	$(DEMO_VENV)/bin/onnxprune run examples/digits/models/detector.onnx --recipe examples/digits/detector.toml --out out/demo

lint: $(VENV)/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-neural-compressor: $(VENV)/.stamp $(NC_VENV)/.stamp
	ONNXPRUNE_NEURAL_COMPRESSOR_PYTHON=$(abspath $(NC_VENV)/bin/python) $(BIN)/python -m pytest tests/neural_compressor

# On x86 with AVX, XNNPACK has no sparse inference; on arm64 it needs no emulator.
test-sparse-emulated: $(VENV)/.stamp
	@case $$(uname -m) in \
	  arm64|aarch64) ;; \
	  *) command -v qemu-x86_64 >/dev/null || command -v qemu-x86_64-static >/dev/null || \
	    { echo "qemu-x86_64 is missing. Install it: apt-get install qemu-user (Debian, Ubuntu), dnf install qemu-user (Fedora)." >&2; exit 1; };; \
	esac
	$(BIN)/python -m pytest tests/sparse_emulated

bench: $(VENV)/.stamp
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) $(DEMO_VENV) $(NC_VENV) out build dist *.egg-info
