.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z_-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.PHONY: demo
demo: .venv/run ## Train Pilot and Copilot on word problems (about three minutes on a CPU) and print the results
	$(RUN) train.py

.PHONY: seeds
seeds: .venv/run ## Train the three demos with three seeds each (about ten minutes) and print one table
	$(RUN) train.py -m experiment=demo,demo_decoder_only,demo_multiple_choice seed=0,1,2 hydra.sweep.dir=runs/demo_seeds
	.venv/bin/tcopilot-table runs/demo_seeds

.PHONY: test
test: .venv/dev ## Run the tests
	$(RUN) -m pytest -q -n 2 --dist worksteal

.PHONY: test-slow
test-slow: .venv/dev ## Run the tests that train and decode more (about half an hour)
	$(RUN) -m pytest -q -m "slow and not gpu" -n 2 --dist worksteal

.PHONY: lint
lint: .venv/dev ## Check formatting and lint rules
	.venv/bin/ruff format --check . && .venv/bin/ruff check .

.PHONY: format
format: .venv/dev ## Format the code
	.venv/bin/ruff format . && .venv/bin/ruff check --fix .

.PHONY: performance
performance: .venv/run ## Measure speed and memory again and update docs/performance.md (about six minutes)
	$(RUN) performance/all.py

DEVICE ?= cuda

.PHONY: gpu
gpu: ## Prove the project on a GPU: tests, invariants, speed (eight minutes); DEVICE=cpu is a dry run with tiny shapes
	$(or $(wildcard $(RUN)),$(PYTHON)) performance/gpu.py --device $(DEVICE)

.PHONY: clean
clean: ## Remove the virtual environment and caches, but no runs
	rm -rf .venv .pytest_cache .ruff_cache

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/run: .venv/bin/pip requirements.txt pyproject.toml
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
