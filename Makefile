PY := .venv/bin/python

.venv/.done: pyproject.toml
	python3 -m venv .venv
	$(PY) -m pip install -q torch==2.13.0
	$(PY) -m pip install -q -e .[dev]
	touch $@

test: .venv/.done
	$(PY) -m pytest -q tests

.PHONY: test
