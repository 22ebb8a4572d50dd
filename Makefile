# Everything sets itself up from a bare clone: a .venv here, the pinned versions of constraints.txt.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
PIP = .venv/bin/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

.PHONY: demo test slow play wheel lint coverage docs clean

demo: .venv/demo
	.venv/bin/gesso train digits --resume
	.venv/bin/gesso evaluate runs/digits
	.venv/bin/gesso report runs/digits

test: .venv/dev
	.venv/bin/pytest -n 2 -q

slow: .venv/dev
	.venv/bin/pytest -m slow -n 2 -q

play: .venv-play/done
	.venv-play/bin/pytest -q tests/integration/test_play.py tests/integration/test_play_page.py

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/pip pyproject.toml $(CONSTRAINTS)
	$(PIP) -e '.[demo,plots]'
	@touch $@

.venv/dev: .venv/bin/pip pyproject.toml $(CONSTRAINTS)
	$(PIP) -e '.[dev]'
	@touch $@

# The wheel outside the checkout, in an environment of its own.
wheel:
	$(PYTHON) tools/check_wheel.py

# gradio needs an older pillow than constraints.txt has.
.venv-play/done: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv-play
	grep -v '^pillow==' $(CONSTRAINTS) > .venv-play/constraints.txt
	.venv-play/bin/pip install --quiet --disable-pip-version-check -c .venv-play/constraints.txt -e '.[dev,play]'
	@touch $@

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

.venv/docs: .venv/bin/pip pyproject.toml $(CONSTRAINTS)
	$(PIP) -e '.[docs]'
	@touch $@

coverage: .venv/dev
	.venv/bin/pytest -n 2 -q --cov --cov-report=term --cov-report=html

clean:
	rm -rf .venv .venv-play build site *.egg-info
