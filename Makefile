# Everything a new machine with Python 3.11 or newer, git and make needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo bench test oldest arm lint types site hooks wheel clean

# torch first: otherwise the packages that need it pull the newest build, with gigabytes of CUDA packages.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

demo: .venv/.installed  ## fit feedback, publish it, fine-tune and compare on a real task
	$(BIN)/metazo demo --out runs/demo --overwrite

bench: .venv/.installed  ## what a step costs beside its forward passes, on this machine: about half an hour
	$(BIN)/metazo bench --out runs/bench

# Files in their order, because xdist would put those with few tests last, and they are the slowest. Compiled modules are
# kept even if the environment asks for the opposite: the suite starts python about a hundred times.
test: lint  ## lint and the whole suite, offline
	HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.venv-oldest/.installed: pyproject.toml
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct --editable '.[test]'
	touch $@

oldest: .venv-oldest/.installed  ## the suite with the oldest versions in pyproject.toml, torch with gigabytes of CUDA packages
	HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE= .venv-oldest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

arm: .venv/.installed  ## the tests of noise and kernels, compiled for ARM and emulated: 3 minutes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check unicorn==2.1.4 capstone==5.0.7
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p tests.arm tests/kernels tests/noise

lint: .venv/.installed  ## ruff and formatting
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: .venv/.lint  ## pyright
	$(BIN)/pyright

.venv/.lint: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[lint]'
	touch $@

site: .venv/.installed  ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

hooks: .venv/.lint  ## run ruff and pyright before every commit
	$(BIN)/pre-commit install

wheel: .venv/.installed
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info runs/demo
