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
# Docker Compose and the profile to start, gpu or cpu; default: what .env says.
COMPOSE ?= docker compose
PROFILE ?=
# Read by the shell rather than pasted into its commands, so that quotes in them do no harm.
export PROMPT MODEL

.DEFAULT_GOAL := help
.PHONY: help demo example-openai test test-gpu lint format protos bench chaos overload fuzz docs dashboards dashboard-pictures profile clean up down logs

help: ## List the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | expand -t 20

$(BASE): pyproject.toml setup.py $(PROTOS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cpu]'
	touch $@

$(DEV): $(BASE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(BASE) ## Start both services on this machine and stream an answer (PROMPT=, MODEL=)
	$(BIN)/nanovllm demo --model "$$MODEL" --prompt "$$PROMPT"

example-openai: $(DEV) ## Start both services and the gateway smg, ask them through OpenAI's SDK (MODEL=)
	$(BIN)/python -m examples.openai_gateway --model "$$MODEL" $(ARGS)

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

docs: $(DEV) ## Write docs/metrics.md and docs/settings.md from the code
	$(BIN)/python -m docs.generate_metrics
	$(BIN)/python -m docs.generate_settings

dashboards: $(DEV) ## Write the Grafana dashboards' JSON from deploy/grafana/
	$(BIN)/python -m deploy.grafana.generate

dashboard-pictures: $(DEV) ## Load both services for seven minutes and draw docs/images/ (MODEL=)
	$(BIN)/python -m deploy.grafana.watched_load --model "$$MODEL" $(ARGS)

chaos: $(DEV) ## Inject faults into both services and compare every token (ARGS= for the script)
	$(BIN)/python -m benchmarks.chaos $(ARGS)

overload: $(DEV) ## Send ten times what can be served; compare latencies (ARGS= for the script)
	$(BIN)/python -m benchmarks.overload $(ARGS)

fuzz: $(DEV) ## Send 100,000 random requests to both services (ARGS= for the script)
	$(BIN)/python -m benchmarks.fuzz $(ARGS)

profile: ## Profile the executor's decode iterations with the python on the PATH (MODEL=, ARGS=)
	$(PYTHON) -m benchmarks.profile_executor --model "$$MODEL" $(ARGS)

.env:
	umask 077 && sed "s|^GRAFANA_ADMIN_PASSWORD=$$|&$$(head -c 16 /dev/urandom | od -An -tx1 | tr -d " \n")|" .env.example > $@

up: .env ## Build the images and start everything in containers (PROFILE=cpu without a GPU)
	$(COMPOSE) $(if $(PROFILE),--profile $(PROFILE)) up --build --detach --wait

down: .env ## Stop the containers and keep their volumes
	$(COMPOSE) --profile '*' down

logs: .env ## Follow the logs of the containers
	$(COMPOSE) --profile '*' logs --follow --tail 100

clean: ## Remove the environment and generated files
	rm -rf $(VENV) nanovllm/v1 build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
