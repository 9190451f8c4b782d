PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint

.venv/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

.venv/.test: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dask,test]'
	touch $@

demo: .venv/.demo
	$(BIN)/gradprojio demo -o demo-output

test: .venv/.test
	$(BIN)/python -m pytest -m 'not slow'

lint: .venv/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
