PYTHON ?= python3
BIN := .venv/bin

.PHONY: constraints demo lint test

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

# Two processes with one thread each: most tests use no more.
test: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile

lint: .venv/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The versions that pip would choose today for the project and nothing else. This torch is the one that the results in
# Docs were measured with; later ones bring several GB for NVIDIA cards.
constraints: .venv/.test
	$(BIN)/python -m pip install --quiet --dry-run --ignore-installed --report .venv/resolved.json \
		torch==2.13.0 '.[dask,test]'
	$(BIN)/python -c "import json; \
		found = [one['metadata'] for one in json.load(open('.venv/resolved.json'))['install']]; \
		names = sorted((f'{one[\"name\"]}=={one[\"version\"].split(\"+\")[0]}' for one in found), key=str.lower); \
		print(*(name for name in names if not name.lower().startswith(('gradprojio', 'setuptools'))), sep='\n')" \
		> constraints.txt
