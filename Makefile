# `make demo` and `make test` set up all that they need; nothing else has to be done first.
PYTHON ?= python3
VENV := .venv

.PHONY: demo test dev clean
demo: $(VENV)/.demo
	$(VENV)/bin/python -m jaxloop

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest

dev: $(VENV)/.dev

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "jaxloop needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
