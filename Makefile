# One command for each habit. `make` lists them.
PYTHON ?= python

.PHONY: help test slow lint fix docs bench dist ci

help: ## list the commands
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 8

test: ## the test suite
	$(PYTHON) -m pytest

slow: ## the slow tests: real weights, frequencies, fuzz, load
	$(PYTHON) -m pytest -m "slow and not cuda"

lint: ## ruff, its formatter, mypy
	ruff check
	ruff format --check
	mypy

fix: ## let ruff correct and format
	ruff check --fix
	ruff format

docs: ## the generated tables and pages, then the site into build/site, every link checked
	$(PYTHON) benchmarks/readme.py
	$(PYTHON) benchmarks/methods_page.py
	$(PYTHON) -m sphinx -q -W --keep-going -c docs . build/site

bench: ## compare methods on this machine (an idle one), 14 minutes at most
	$(PYTHON) -m outpace compare

dist: ## the source archive and the wheel, into dist
	rm -rf build/lib dist
	$(PYTHON) -m build

ci: ## everything that must pass
	.ci/run
