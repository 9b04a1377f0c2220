# Everything a user or developer types. `make help` lists it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Marks that the environment is complete for the extras that a target needs.
BASE := $(VENV)/.installed-cpu
DEV := $(VENV)/.installed-dev
PROTOS := $(wildcard protos/nanovllm/v1/*.proto) protos/generate.py
PROMPT ?= What is the capital of France? Answer in one sentence.
MODEL ?= smollm2-135m-instruct
ARGS ?=
# Read by the shell rather than pasted into its commands, so that quotes in them do no harm.
export PROMPT MODEL

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu lint format protos bench profile clean

help: ## List the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | expand -t 14

$(BASE): pyproject.toml setup.py $(PROTOS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cpu]'
	touch $@

$(DEV): $(BASE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(BASE) ## Start both services on this machine and stream an answer (PROMPT=, MODEL=)
	$(BIN)/nanovllm demo --model "$$MODEL" --prompt "$$PROMPT"

test: $(DEV) ## Run the test suite on the CPU (ARGS= for pytest)
	$(BIN)/python -m pytest $(ARGS)

test-gpu: ## Run the GPU tests with the python on the PATH (ARGS= for pytest)
	$(PYTHON) -m pytest -m gpu $(ARGS)

lint: $(DEV) ## Check style, types and protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint

format: $(DEV) ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(DEV) ## Generate the stubs nanovllm/v1 from protos/
	$(BIN)/python protos/generate.py

bench: $(DEV) ## Measure throughput on this machine (MODEL=, ARGS= for the script)
	$(BIN)/python -m benchmarks.throughput --model "$$MODEL" $(ARGS)

profile: ## Profile the executor's decode iterations with the python on the PATH (MODEL=, ARGS=)
	$(PYTHON) -m benchmarks.profile_executor --model "$$MODEL" $(ARGS)

clean: ## Remove the environment and generated files
	rm -rf $(VENV) nanovllm/v1 build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
