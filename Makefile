# make help lists the targets. Everything runs in .venv, which `make install` builds.
PYTHON ?= python3.11
ARGS ?=
PARITY_ARGS ?=
# The newest that is tested; setup.py names the one that is installed.
OTHER_MEGATRON = 0.19.2

.DEFAULT_GOAL := help
.PHONY: help install quickstart test sglang test-sglang parity docs lint format

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

install: ## build .venv with all that a run on CPU and the tests need
	@$(PYTHON) tools/install.py

quickstart: install ## train a tiny policy with FIPO on CPU; overrides: make quickstart ARGS="seed=1 trainer.steps=5"
	.venv/bin/python tools/train.py configs/quickstart_cpu.yaml $(ARGS)

test: install sglang lint ## lint and run all tests; a selection: make test ARGS="-k loss -m 'not slow'"
	.venv/bin/python -m pytest $(ARGS)

sglang: install ## build the second environment, with SGLang on a CPU
	@$(PYTHON) tools/install.py --sglang

test-sglang: sglang ## what a real SGLang server on a CPU does, against what the project asks of it
	.venv/bin/python -m pytest -m sglang $(ARGS)

parity: install ## long log-probs against float64; every layout and family against transformers, on both Megatron versions: PARITY_ARGS="--family qwen3"
	.venv/bin/python -m pytest --wide -m wide
	.venv/bin/python tools/check_layouts.py $(PARITY_ARGS)
	@$(PYTHON) tools/install.py --megatron $(OTHER_MEGATRON)
	PYTHONPATH=.venv/megatron-core-$(OTHER_MEGATRON) .venv/bin/python tools/check_layouts.py $(PARITY_ARGS)

docs: install ## build the documentation site in build/site; warnings are errors
	@$(PYTHON) tools/install.py --docs
	.venv/bin/python tools/write_config_reference.py --check
	NO_MKDOCS_2_WARNING=1 .venv/docs/bin/mkdocs build --strict

lint: install ## ruff and mypy, without changing a file
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

format: install ## let ruff rewrite what it can
	.venv/bin/ruff check --fix
	.venv/bin/ruff format
