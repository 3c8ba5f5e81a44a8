# `make demo` and `make test` need Python 3.11 or newer, make, and a package index.
PYTHON ?= python3
BIN := .venv/bin
DATA_DIR ?= data/beir
export TOKENIZERS_PARALLELISM := true

.PHONY: help install demo test test-fast fuzz load benchmark ablations anchors docs check fix clean
.DEFAULT_GOAL := help

help:  ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: .venv/.installed  ## Create .venv with pinned dependencies.

.venv/.installed: setup.cfg constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expected Python 3.11 or newer: run make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,test]'
	touch $@

demo: install  ## Train on the documentation strings of installed packages, evaluate, save, reload, search.
	$(BIN)/python training/demo.py

test: check  ## Run the linters and all tests, including the slow ones.
	$(BIN)/python -m pytest -q -m 'not gpu' --durations=10 -n 2 --dist loadfile --no-loadscope-reorder \
		--max-worker-restart 0

test-fast: install  ## Run only the quick tests.
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

fuzz: install  ## Try 10,000 inputs and damages, kill every write, resume at every step, plant code, export 25 families.
	FUZZ_INPUTS=10000 $(BIN)/python -m pytest -q -s tests/cli/test_fuzz.py tests/cli/test_kills.py \
		tests/cli/test_foreign_code.py tests/cli/test_damage.py tests/trainer/test_resume.py -m ''
	FUZZ_INPUTS=10000 $(BIN)/python -m pytest -q tests/model/test_encoder_families.py -k onnx -m ''

load: install  ## 50 clients at the search page, writers and prunings of one cache, a million texts, 100 trainings.
	$(BIN)/python training/benchmarks/load.py --data_dir $(DATA_DIR)

benchmark: install  ## Measure every claim about speed; DATA_DIR=... is the folder with BEIR's scifact.
	$(BIN)/python training/benchmarks/run_all.py --data_dir $(DATA_DIR)

ablations: install  ## Measure what each loss term, kind, start and width is worth; adds SciFact if DATA_DIR has it.
	$(BIN)/python training/benchmarks/ablations.py --train_data python_docs $(wildcard $(DATA_DIR)/scifact)

anchors: install  ## The recipes on other encoders, in one table: BASES="one another", DATA_DIR with BEIR folders.
	$(BIN)/python training/benchmarks/anchors.py --bases $(or $(BASES),embedded) --data_dir $(DATA_DIR)

docs: install  ## Build the pages of the API into build/site.
	$(BIN)/mkdocs build

check: install  ## Run the linters and the type checker.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPY_NUM_WORKERS=2 $(BIN)/mypy
	$(BIN)/pydoclint --quiet ragcun_hf

fix: install  ## Format, and fix what the linters can fix.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment, build folders and the demo's output.
	rm -rf .venv build *.egg-info demo
