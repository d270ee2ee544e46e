# `make` alone prints what there is. Each target creates .venv on first use and installs what it needs; it installs again
# only when pyproject.toml or constraints.txt have changed.

VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
# Python compiles what it imports. Of what is installed here that is a small part, and all of it takes half a minute.
INSTALL := $(PIP) install --no-compile
# Which Python makes the environment: the one named with PYTHON=..., else the first of these that is new enough.
CANDIDATES := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.14)
TORCH := $(shell sed -n 's/^torch==/&/p' constraints.txt)

# Options of the demo, for example: make demo DEMO="--steps 200"
DEMO ?=
DEMO_RUN := runs/demo
DEMO_MEDIA_RUN := runs/demo-media
# Further pytest options, for example: make test PYTEST="-k linear -x"
PYTEST ?=
# What `make mutate` tries, for example: make mutate MUTATE="reference/ops --jobs 8 --budget 600"
MUTATE ?=
# Processes of the suite: a number, or one a core. On a small GPU fewer may be needed, as each holds a context of its own.
JOBS ?= auto

# A waiting OpenMP thread sleeps soon. Spinning longer gains little on idle cores and costs much on busy ones.
export GOMP_SPINCOUNT ?= 1000

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
.NOTPARALLEL:  # two pips must not write to one environment
.PHONY: help install demo demo-media test lint mutate format bench docs

help: ## this list
	@awk -F '## ' '/^[a-z-]+:.*## / { split($$1, name, ":"); printf "  make %-10s %s\n", name[1], $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Examples:"
	@echo "  make demo DEMO=\"--steps 100\"             a shorter run; options of 'arb train' (see: $(BIN)/arb train --help)"
	@echo "  make test PYTEST=\"-k linear -x\"          part of the suite"
	@echo "  make test PYTEST=\"--impl some.module\"    the suite against another implementation"
	@echo "  make lint                                ruff, ruff format, mypy, the import lint, workflows"
	@echo "  make format                              let ruff mend what it can"
	@echo "  make bench PYTEST=\"-k linear\"            one family of benchmarks"
	@echo "  make docs                                the site, in site/index.html"
	@echo "  make demo PYTHON=/opt/python3.12/bin/python3    choose the Python of the environment"

install: $(VENV)/.installed-arb ## the command arb and the package, in .venv (source .venv/bin/activate finds it)
	@echo "The command arb is in $(BIN). Let this shell find it: source $(BIN)/activate"

demo: $(VENV)/.installed-arb ## train the tiny preset on Python's own sources, show the result (6 to 20 minutes)
	rm -rf $(DEMO_RUN)
	$(BIN)/arb train --run $(DEMO_RUN) $(DEMO)

demo-media: $(VENV)/.installed-sidecars,media ## pictures, sounds and videos that a script renders: train, measure, show (5 minutes)
	rm -rf $(DEMO_MEDIA_RUN) $(DEMO_MEDIA_RUN)-data
	$(BIN)/python -m bench.media --run $(DEMO_MEDIA_RUN) $(DEMO)

# Stealing gives each process a run of neighbouring tests, which share what they have built.
test: $(VENV)/.installed-test ## run the conformance suite
	$(BIN)/python -m pytest conformance -n $(JOBS) --dist worksteal $(PYTEST)

lint: $(VENV)/.installed-test $(VENV)/.installed-dev ## ruff, type check, import lint, workflows, freshness of generated pages
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m conformance.import_lint
	$(BIN)/python .ci/check-workflows
	$(BIN)/python -m bench.report --check

mutate: $(VENV)/.installed-test ## change the product one statement at a time, list what no test notices (hours; see CONTRIBUTING.md)
	$(BIN)/python -m conformance.mutate $(MUTATE)

format: $(VENV)/.installed-dev ## let ruff mend what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.installed-bench ## time every op, compare with peers (a small set where there is no GPU)
	$(BIN)/python -m pytest bench $(PYTEST)

docs: $(VENV)/.installed-bench $(VENV)/.installed-docs ## write the generated pages, build the documentation into site/
	$(BIN)/python -m bench.report
	$(BIN)/mkdocs build --strict

# --- installation ---------------------------------------------------------------------------------------------------

# A failed attempt leaves nothing behind, so that the next one starts from the beginning.
$(BIN)/pip:
	@test -e $(VENV) && existed=yes; \
	for python in $(CANDIDATES); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    echo "Creating $(VENV) with $$($$python --version) ($$python)"; \
	    "$$python" -m venv $(VENV) && exit 0; \
	    test "$$existed" || rm -rf $(VENV); \
	    echo "Could not create $(VENV): the lines above say why (Debian and Ubuntu keep venv in the package python3-venv)." >&2; \
	    exit 1; \
	  fi; \
	done; \
	found=$$($(firstword $(CANDIDATES)) --version 2>/dev/null || echo missing); \
	echo "ARB needs Python 3.11 or newer, but $(firstword $(CANDIDATES)) is $$found: install a newer one, or name it with 'make $(or $(MAKECMDGOALS),demo) PYTHON=/path/to/python3'." >&2; \
	exit 1

# torch first and alone: see constraints.txt.
$(VENV)/.installed-torch: constraints.txt | $(BIN)/pip
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(VENV) holds $$($(BIN)/python --version), but ARB needs Python 3.11 or newer: delete $(VENV) and run make again." >&2; exit 1; }
	$(INSTALL) $(TORCH)
	@touch $@

# .installed-arb is the package alone, .installed-X the package with its extras X.
$(VENV)/.installed-%: $(VENV)/.installed-torch pyproject.toml constraints.txt
	$(INSTALL) --constraint constraints.txt --editable "$(if $(filter arb,$*),.,.[$*])"
	@touch $@
