# The two commands of the README, and what developers need. Everything is installed into .venv.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
OUT ?= runs/demo
SEED ?= 0

.PHONY: demo test lint bench clean

demo: $(VENV)/.installed
	$(RUN)/anystate demo --out $(OUT) --seed $(SEED)

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest tests -n 2 --dist loadfile

lint: $(VENV)/.installed-dev
	$(RUN)/ruff check --config .ci/ruff.toml .
	$(RUN)/ruff format --check --config .ci/ruff.toml .

bench: $(VENV)/.installed
	$(RUN)/anystate bench kernels --size small

clean:
	rm -rf $(VENV) build *.egg-info

# torch first, with its exact version: anything that merely depends on it would fetch another build
PIP := $(RUN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable ".[dev]"
	touch $@
