# `make scan` and `make test` are the two commands of the README; each sets up its environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: scan test check docs gallery site clean

scan: $(STAMP)
	$(BIN)/lora-forensics scan sample_runs/

test: check
	$(BIN)/python -m pytest -n auto

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Pages that are made from the code; a test fails when they are stale.
docs: $(STAMP)
	$(BIN)/lora-forensics metrics --markdown > docs/columns.md
	$(BIN)/lora-forensics formats --markdown > docs/formats.md
	$(BIN)/lora-forensics rules --markdown > docs/rules.md
	LORA_FORENSICS_REGENERATE=1 $(BIN)/python -m pytest -q tests/test_docs.py -k pages_of_rules_and_settings

# The pictures of the docs, of a scan of the sample runs; needs chromium and chromedriver.
gallery: $(STAMP)
	LORA_FORENSICS_REGENERATE=1 $(BIN)/python -m pytest -q tests/reports/test_gallery.py

# The documentation as a site, in build/site.
site: $(STAMP)
	$(BIN)/mkdocs build --quiet -f .mkdocs.yml

$(STAMP): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt --editable '.[test]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) forensics
