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

test: lint unit

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

unit: install
	RAY_worker_niceness=0 OMP_NUM_THREADS=2 $(PY) -m pytest $(ARGS)

clean:
	rm -rf runs outputs multirun
