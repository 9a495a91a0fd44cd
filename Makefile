# `make demo` and `make test` install what they need into .venv. Nothing else is needed first.
PYTHON ?= python3
VENV := .venv

.PHONY: demo test docs dev check clean
demo: $(VENV)/.demo  # trains on handwritten digits and plots the learning curves
	$(VENV)/bin/python -m jaxloop

test: $(VENV)/.test  # runs the tests, in two processes
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

docs: $(VENV)/.docs  # builds the documentation: open site/index.html
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet

dev: $(VENV)/.dev  # installs everything that contributors need

check:  # the quick checks of CI: a few minutes
	PYTHON=$(PYTHON) bash .ci/run lint types docs doctests

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "jaxloop needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .coverage
