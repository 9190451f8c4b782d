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

test: .venv/.test
	$(BIN)/python -m pytest -m 'not slow'

lint: .venv/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Versions of everything that the project needs, and of nothing else. This torch is the one that the results in Docs
# were measured with; later ones bring several GB for NVIDIA cards.
constraints:
	$(PYTHON) -m venv --clear .venv-constraints
	printf 'torch==2.13.0\n' > .venv-constraints/torch.txt
	.venv-constraints/bin/python -m pip install --quiet -c .venv-constraints/torch.txt '.[dask,test]'
	.venv-constraints/bin/python -m pip list --format=freeze --exclude gradprojio --exclude pip --exclude setuptools \
		> constraints.txt
	rm -r .venv-constraints
