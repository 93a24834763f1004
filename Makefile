# make demo   runs the main job on a real model       (installs only what that needs)
# make test   lints, type-checks and runs all tests   (installs everything that the tests exercise)
# make bench  prints the figures of benchmarks/       (slow)

PYTHON ?= python3
PIP_FLAGS := --disable-pip-version-check --no-input -q
VENV := .venv
DEMO_VENV := .venv-demo

.PHONY: demo test lint bench clean help
.DEFAULT_GOAL := help

help:
	@sed -n '1,/^$$/s/^# //p' Makefile

# The stamp names what an environment was made from: a changed pin or dependency makes it anew.
$(VENV)/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "onnxprune needs Python 3.11 or newer; name one with: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $@

$(DEMO_VENV)/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "onnxprune needs Python 3.11 or newer; name one with: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[eval]'
	touch $@

demo: $(DEMO_VENV)/.stamp
	$(DEMO_VENV)/bin/onnxprune run examples/digits/models/detector.onnx --recipe examples/digits/detector.toml --out out/demo

lint: $(VENV)/.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

test: lint
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

bench: $(VENV)/.stamp
	$(VENV)/bin/python benchmarks/run.py

clean:
	rm -rf $(VENV) $(DEMO_VENV) out build dist *.egg-info
