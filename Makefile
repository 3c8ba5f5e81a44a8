# Two commands do everything on a machine with Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
DATA_DIR ?= data/beir
export TOKENIZERS_PARALLELISM := true

.PHONY: help install demo test test-fast benchmark ablations check fix clean
.DEFAULT_GOAL := help

help:  ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: .venv/.installed  ## Make .venv with everything pinned.

.venv/.installed: setup.cfg constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,test]'
	touch $@

demo: install  ## Train on the documentation of installed packages, evaluate, save, reload, search.
	$(BIN)/python training/demo.py

test: check  ## Linters and every test, the slow ones too.
	$(BIN)/python -m pytest -q -m 'not gpu' --durations=10 -n 2 --dist loadfile

test-fast: install  ## The quick tests only.
	$(BIN)/python -m pytest -q

benchmark: install  ## Every claim about speed beside its peer; DATA_DIR=... for BEIR.
	$(BIN)/python training/benchmarks/run_all.py --data_dir $(DATA_DIR)

ablations: install  ## What each loss term, kind, start and width is worth; DATA_DIR=... for SciFact beside the demo's corpus.
	$(BIN)/python training/benchmarks/ablations.py --train_data python_docs $(wildcard $(DATA_DIR)/scifact)

check: install  ## Linters and type checker.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pydoclint --quiet ragcun_hf

fix: install  ## Let the linters mend what they can.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove what was built here.
	rm -rf .venv build *.egg-info demo
