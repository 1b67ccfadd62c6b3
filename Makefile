# make train   trains a small model with DVPO on this machine's CPU
# make test    runs all checks and tests
# make docs    builds the documentation site into runs/site
# All install what they need into .venv first.

VENV ?= .venv
PY := $(VENV)/bin/python
ALGORITHM ?= dvpo
ARGS ?=

.PHONY: install train test lint unit e2e long docs clean

install:
	@VENV=$(VENV) bash scripts/install.sh

train: install
	$(PY) -m verl_dvpo.cli demo --out runs/demo/$(ALGORITHM) algorithm=$(ALGORITHM) $(ARGS)

test: lint docs unit e2e

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Two processes with a thread each; runs through Ray come after them, two at a time, each on a Ray of its own.
unit: install
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not e2e" --numprocesses 2 --dist loadfile $(ARGS)

e2e: install
	RAY_worker_niceness=0 OMP_NUM_THREADS=1 $(PY) -m pytest -m "e2e and not long" --numprocesses 2 --dist loadgroup $(ARGS)

# Trainers on two nodes, interrupted answers, a launcher of clusters.
long: install
	RAY_worker_niceness=0 OMP_NUM_THREADS=2 $(PY) -m pytest -m long $(ARGS)

# A warning is an error. Material's notice that mkdocs 2 will need another theme is no warning of this site.
docs: install
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

clean:
	rm -rf runs outputs multirun
