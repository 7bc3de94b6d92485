# The commands of a contributor; CI runs the same ones. `make` lists them.
SHELL := bash
PYTHON ?= python
PIP_INSTALL := pip install -q -c constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

OLDEST := $(shell sed -n 's/.*"pytorch-lightning>=\(.*\)".*/\1/p' pyproject.toml)
# whatever depends on the loop of Lightning; globs, so that a module of tests can be split
OLDEST_TESTS := $(patsubst %,tests/test_%*.py,adaptive callbacks measurements monitors namespaces processes replay together weights)

.PHONY: help check test slow docs site screenshots both kernels ray crash oldest wheel

help: ## List the commands.
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 14

check: ## Lint, check the format, and check the types.
	ruff check .
	ruff format --check .
	pyright --pythonpath "$$(command -v $(PYTHON))"

test: ## Run all tests but the slow ones.
	pytest

slow: ## Run the slow tests.
	pytest -m slow

docs: ## Run the examples of the docstrings, the README and the docs.
	pytest -m "slow or not slow" lightning_noise tests/test_readme*.py

site: ## Build the documentation site in build/site, with warnings as errors.
	$(PYTHON) -m sphinx --fail-on-warning --nitpicky --quiet --fresh-env --write-all -d build/doctrees docs build/site

screenshots: ## Take the pictures in docs/images; needs the extra docs, and Chromium.
	$(PYTHON) docs/screenshots.py

both: VENV ?= build/both
both: ## Run the tests of the two Lightnings and of peft, installed together in VENV (default: build/both).
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	source $(VENV)/bin/activate && $(PIP_INSTALL) -e ".[test]" lightning
	set -o pipefail; source $(VENV)/bin/activate && pytest -rs tests/test_namespaces*.py | tee $(VENV)/tests.txt
	source $(VENV)/bin/activate && $(PIP_INSTALL) peft
	set -o pipefail; source $(VENV)/bin/activate && pytest -rs -m slow tests/matrix -k peft | tee -a $(VENV)/tests.txt
	@if grep '^SKIPPED' $(VENV)/tests.txt; then echo "no test may be skipped if all three are installed"; exit 1; fi

kernels: VENV ?= build/kernels
kernels: ## Run the kernel for GPUs in the interpreter of Triton, and compile it; Triton is installed in VENV.
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	source $(VENV)/bin/activate && $(PIP_INSTALL) -e ".[test]" triton
	set -o pipefail; source $(VENV)/bin/activate && TRITON_INTERPRET=1 pytest -n0 -rs -m "slow or not slow" tests/test_kernels.py \
	  | tee $(VENV)/kernels.txt
	@if grep '^SKIPPED' $(VENV)/kernels.txt; then echo "no test may be skipped with Triton"; exit 1; fi

ray: VENV ?= build/ray
ray: ## Run the tests of torchrun and Ray, which is installed in VENV (default: build/ray).
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	source $(VENV)/bin/activate && $(PIP_INSTALL) -e ".[test]" "ray[train]"
	source $(VENV)/bin/activate && pytest -n0 -rs -m slow tests/test_cluster.py

crash: ## Kill 200 fits at random moments and examine what they leave behind; takes minutes.
	cd tests && $(PYTHON) -W ignore -m crash --fits 200

oldest: VENV ?= build/oldest
oldest: ## Run the tests of the loop with the oldest supported Lightning, installed in VENV (default: build/oldest).
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	sed "s/^pytorch-lightning==.*/pytorch-lightning==$(OLDEST)/" constraints.txt > $(VENV)/constraints.txt
	source $(VENV)/bin/activate && pip install -q -c $(VENV)/constraints.txt -e ".[test]"
	source $(VENV)/bin/activate && pytest $(OLDEST_TESTS) -k "not shard"

wheel: ## Build the wheel, and run the demonstration in an environment of its own.
	rm -rf dist build/wheel
	$(PYTHON) -m build
	$(PYTHON) -m twine check --strict dist/*
	$(PYTHON) -m venv build/wheel
	source build/wheel/bin/activate && $(PIP_INSTALL) "$$(ls dist/*.whl)[demo]" && python -I .ci/use_wheel.py
