# make train   trains a small model with DVPO on this machine's CPU
# make test    runs all checks and tests
# Both install what they need into .venv first.

VENV ?= .venv
PY := $(VENV)/bin/python
ALGORITHM ?= dvpo
ARGS ?=

.PHONY: install train test lint unit e2e clean

install:
	@VENV=$(VENV) bash scripts/install.sh

train: install
	$(PY) -m verl_dvpo.cli demo --out runs/demo/$(ALGORITHM) algorithm=$(ALGORITHM) $(ARGS)

test: lint unit e2e

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Two processes with a thread each; runs through Ray come after them, one at a time.
unit: install
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not e2e" --numprocesses 2 --dist loadfile $(ARGS)

e2e: install
	RAY_worker_niceness=0 OMP_NUM_THREADS=2 $(PY) -m pytest -m e2e $(ARGS)

clean:
	rm -rf runs outputs multirun
