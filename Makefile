# Everything people do with a checkout. Each target installs what it needs into .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TRACKERS := wandb mlflow trackio
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: demo test quick elsewhere check trackers evidently promptfoo bench docs matrix families faults proto clean help

help: ## Show the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fedloom needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing fedloom into $(VENV) (a few minutes the first time)"
	$(INSTALL) .
	@touch $@

$(VENV)/.installed-all: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing fedloom with all extras into $(VENV) (a few minutes the first time)"
	$(INSTALL) '.[simulation,deepspeed,dev]'
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed ## Three hospitals, four ways of training, one picture: runs/demo/report.html
	$(BIN)/python -m examples.demo

test: $(VENV)/.installed-all ## The whole suite, and the share of the code that it runs
	COVERAGE_CORE=$$($(BIN)/python -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")') \
		$(BIN)/python -m pytest --cov

quick: $(VENV)/.installed-all ## The tests that start no processes, wait for nothing and train for no more than a moment
	$(BIN)/python -m pytest -m "not slow"

elsewhere: ## A wheel on the newest other Python, with PyTorch as the index gives it: the demo in small, the quick tests
	.ci/elsewhere

check: $(VENV)/.installed-all ## Style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Each in an environment of its own, over the one of all others: mlflow wants older libraries than fedloom's.
$(VENV)/trackers/%/.installed: | $(VENV)/.installed-all
	$(BIN)/python -m venv --without-pip $(@D)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/fedloom.pth
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $*
	@touch $@

trackers: $(TRACKERS:%=$(VENV)/trackers/%/.installed) ## The tests of trackers beside the real libraries (half a gigabyte)
	for tracker in $(TRACKERS); do \
		$(VENV)/trackers/$$tracker/bin/python -m pytest -n 0 -k $$tracker tests/core_training/runs/test_trackers.py || exit 1; \
	done

evidently: $(VENV)/.installed-all ## The tests of evaluations beside the real Evidently, in its own environment (1 GB)
	$(BIN)/python -m evaluation.bridges.environments evidently
	BRIDGES_REQUIRED=1 $(BIN)/python -m pytest -n 0 -k evidently tests/evaluation tests/fedloom/test_evaluation_bridges.py

promptfoo: $(VENV)/.installed-all ## The tests of evaluations beside the real promptfoo, in its own environment (500 MB)
	$(BIN)/python -m evaluation.bridges.environments promptfoo
	BRIDGES_REQUIRED=1 $(BIN)/python -m pytest -n 0 -k promptfoo tests/evaluation tests/fedloom/test_evaluation_bridges.py

bench: $(VENV)/.installed-all ## The figures in docs/results.md
	$(BIN)/python -m benchmarks

docs: $(VENV)/.installed-all ## The pages of docs/ that commands make: recipe.md, templates.md, what data.md and evaluation.md show
	$(BIN)/fedloom recipe schema --markdown > docs/recipe.md
	$(BIN)/python -m tests.templates > docs/templates.md
	DATA_PAGE=1 $(BIN)/python -m pytest -q -n 0 tests/fedloom/test_data_page.py
	EVALUATION_PAGE=1 $(BIN)/python -m pytest -q -n 0 tests/fedloom/test_evaluation_page.py

matrix: $(VENV)/.installed-all ## Every stage × tuning mode × topology: docs/matrix.md
	MATRIX_PAGE=docs/matrix.md $(BIN)/python -m pytest -n 0 tests/matrix

families: $(VENV)/.installed-all ## Every family of models in every cell: docs/families.md (half an hour)
	$(BIN)/python -m tests.families > docs/families.md.new && mv docs/families.md.new docs/families.md

faults: $(VENV)/.installed-all ## Every fault at every point of a round: docs/faults.md (an hour, as root)
	$(BIN)/python -m tests.faults > docs/faults.md.new && mv docs/faults.md.new docs/faults.md

proto: $(VENV)/.installed-all ## p2p's generated gRPC code from its .proto file
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. p2p/gossip.proto

clean: ## Remove what was built and run
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info
