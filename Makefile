# The two commands of the README, and what developers need. Everything is installed into .venv.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
OUT ?= runs/demo
SEED ?= 0

TYPED := $(foreach folder,configs kernels diffusion model sample train bench,-p anystate.$(folder)) -m anystate.cli

.PHONY: demo test test-long lint style types pages bench clean

demo: $(VENV)/.installed
	$(RUN)/anystate demo --out $(OUT) --seed $(SEED)

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder -m "not long" $(PYTEST_OPTIONS)

# what takes long: code for a GPU at tiny sizes or counted, whole systems in their own processes, 300 random tables
test-long: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest tests -n 2 --dist loadgroup -m long $(PYTEST_OPTIONS)

lint: style types

style: $(VENV)/.installed-dev
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

# mypy takes a package's name from its folder, and this folder may have any: it reads the package through a link
types: $(VENV)/.installed-dev
	mkdir -p $(VENV)/types
	ln -sfn $(CURDIR) $(VENV)/types/anystate
	cd $(VENV)/types && $(abspath $(RUN))/mypy --config-file anystate/pyproject.toml $(TYPED)

# docs/settings.md and docs/api.md
pages: $(VENV)/.installed
	$(RUN)/python -m anystate.configs.page
	$(RUN)/python docs/make_api.py

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
