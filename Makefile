# make demo   install, evaluate four selectors on the tiny model, write outputs/demo/report.html
# make test   run the tests          make lint   style, types, import directions
# make tiny   train the tiny model from scratch on two cores   make adapters   then one LoRA for each selector
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_ARGS ?=

.PHONY: setup demo test lint tiny adapters clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@echo "installing into $(VENV); this takes a minute or two"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/python eval.py -m study=demo threads=1 resume=true experiment=none,adapted selector=pooled,full,random,shirg
	@echo "report: outputs/demo/report.html"

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Each stage starts from the weights of the one before it; a gate that fails stops the chain.
TRAIN := $(BIN)/python train.py study=tiny overwrite=true threads=2
tiny: setup
	$(TRAIN) stage=vision model=tiny_scratch weights=outputs/tiny/vision
	$(TRAIN) stage=text model.path=outputs/tiny/vision weights=outputs/tiny/text
	$(TRAIN) stage=align model.path=outputs/tiny/text weights=outputs/tiny/align
	$(TRAIN) stage=base selector=pooled model.path=outputs/tiny/align weights=outputs/tiny/base
	@echo "weights: outputs/tiny/base; use them with model.path=outputs/tiny/base"

# One adapter for each selector, all for the same steps from the same base.
adapters: $(addprefix adapter-,pooled full random shirg)
adapter-%: setup
	$(TRAIN) selector=$* model.path=outputs/tiny/base weights=outputs/tiny/base/adapters/$*

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
