# make demo: tune a Wide ResNet by its marginal likelihood.  make test: the test suite, of its largest tables
# of parameters a part.  make test-fast: some of it, under a minute.
# make test-attacks: kills, damaged files, full disks, threads.
# make lint, make types: ruff and pyright.  make docs: the pages, in $(DOCS).  make dist: wheel and sources, in $(DIST).
# make architecture: the picture of the layers.
# All create the environment that they need; run again, they are quick.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DOCS ?= build/docs
DIST ?= dist

# the rungs of the ladder in CONTRIBUTING.md, in small
FAST := tests/test_registration.py tests/test_looked_at_once.py tests/test_architecture.py tests/test_likelihoods.py tests/kfac tests/matrices \
	tests/curvature/test_kron_exactness.py tests/curvature/test_native.py tests/posterior/test_posterior.py tests/posterior/test_newton.py \
	tests/marglik/test_objective.py tests/marglik/test_checkpoint.py

.PHONY: demo test test-fast test-attacks test-hard test-device test-matrix lint types format dist docs architecture clean

demo: $(VENV)/.installed
	$(BIN)/laplace-ws train --config demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 3 --dist worksteal --ignore tests/hard

test-fast: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 $(FAST)

# Kills, damaged files, full disks and threads; `test-hard` tries each ten times as often, and docs/reliability.md has the result.
test-attacks: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 tests/hard

test-hard: $(VENV)/.installed-test
	$(BIN)/python -m pytest --hard -n 2 tests/hard
	$(BIN)/python -m pytest --hard -n 2 --ignore tests/hard -m "long or many"

# All tests on each of these, with the oldest and the newest torch: hours, and several GB at a time.
PYTHONS ?= python3.10 python3.13
test-matrix:
	$(PYTHON) scripts/test_matrix.py $(PYTHONS)

# Strict where pyproject.toml says so; then every public name of the package must have a type that users' checkers know.
types: $(VENV)/.installed-test
	$(BIN)/python -m pyright --pythonpath $(BIN)/python
	PATH="$(abspath $(BIN)):$$PATH" PYTHONPATH="$(CURDIR)" $(BIN)/python -m pyright --verifytypes laplace_ws --ignoreexternal \
		> $(VENV)/types.txt || { cat $(VENV)/types.txt; exit 1; }

dist: $(VENV)/.installed-test
	$(BIN)/python scripts/check_dist.py $(DIST)

architecture: $(VENV)/.installed-test
	$(BIN)/python scripts/draw_architecture.py

# A cross-section on the simulated second device. All of it: pytest --device simulated, with the files or folders to run; on a GPU: --device cuda.
test-device: $(VENV)/.installed-test
	$(BIN)/python -m pytest --device simulated tests/test_second_device.py
	$(BIN)/python -m pytest --device simulated --every 199 tests/curvature/test_conformance.py tests/posterior tests/marglik/test_training.py \
		tests/marglik/test_checkpoint.py tests/marglik/test_hyper_optimizers.py \
		-k "not adam and not asdl-conv2d and not closed_form and not finds_the_noise and not go_on and not mackays_updates \
			and not memory_stays and not other_lengths and not small_parts"

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-test
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html -d $(DOCS)/.doctrees docs $(DOCS)

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.cfg pyproject.toml | $(BIN)/python
	@echo "Installing laplace_ws into $(VENV) (PyTorch is several GB: a few minutes the first time)"
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: setup.cfg pyproject.toml | $(BIN)/python
	@echo "Installing laplace_ws with its test tools and Sphinx into $(VENV) (PyTorch is several GB: a few minutes the first time)"
	$(BIN)/python -m pip install --quiet --editable '.[test,docs,experiments]'
	@touch $@ $(VENV)/.installed
