# make demo   install, evaluate four selectors on the tiny model, write outputs/demo/report.html
# make test   run the tests          make lint   style, types, import directions
# make tiny   train the tiny model from scratch on two cores
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_ARGS ?=

.PHONY: setup demo test lint tiny clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@echo "installing into $(VENV); this takes a minute or two"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/python eval.py -m study=demo selector=pooled,full,random,shirg
	@echo "report: outputs/demo/report.html"

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Each stage starts from the weights of the stage before it; a gate that fails stops the chain.
tiny: setup
	$(BIN)/python train.py study=tiny stage=vision
	$(BIN)/python train.py study=tiny stage=text
	$(BIN)/python train.py study=tiny stage=align
	$(BIN)/python train.py study=tiny stage=base

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
