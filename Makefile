# LoRA in JAX. `make book` builds the site, `make test` runs every test; both install what they need into .venv first.
# Choose a Python with `make install PYTHON=python3.12`; `uv` is used when it is on the path.

VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PORT ?= 8000
STUDENT ?= _build/student
MIRROR ?= mirror
PYTEST_ARGS ?=
WORKERS ?= 2
BIN = $(VENV)/bin
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

# The first of these that runs and is new enough. A name on the path may still be a shim that does not run.
# An old one is handed to tools/install.py all the same: it says what is wrong in one line.
FOUND = $(shell for p in python3 python3.12 python3.13 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; exit; }; done; \
	command -v python3 2>/dev/null)
RUN_PYTHON = $(or $(PYTHON),$(FOUND))

.DEFAULT_GOAL := help
.PHONY: help install book test test-units test-chapters test-long lab serve execute alone sync student assignments check format
.PHONY: test-browser install-peers test-peers install-tpu test-tpu mirror linkcheck constraints clean

TESTS = $(BIN)/python -m pytest --durations=30
PARALLEL = -n $(WORKERS) --dist loadgroup
HERE = not browser and not peers and not tpu
# What the user added. It may leave a pass without tests, which pytest calls status 5.
CHOSEN = $(PYTEST_ARGS) $(if $(PYTEST_ARGS),|| test $$? -eq 5)

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/:/' | awk -F': +' '{printf "make %-14s %s\n", $$1, $$2}'

install:  ## make or update .venv
	@test -n "$(RUN_PYTHON)" || { echo "install: no python3 found: on Debian or Ubuntu run 'apt-get install python3 python3-venv'" >&2; exit 2; }
	@command -v $(RUN_PYTHON) >/dev/null || { echo "install: $(RUN_PYTHON) not found" >&2; exit 2; }
	@$(RUN_PYTHON) tools/install.py --venv "$(VENV)" --constraints "$(CONSTRAINTS)" $(if $(PYTHON),--this-python)

book: install  ## build the site into _build/html from the recorded outputs
	@$(BIN)/jupyter-book build . --warningiserror --keep-going --quiet
	@echo "Open _build/html/index.html, or run: make serve"

test:  ## every test that needs no browser (PYTEST_ARGS="-k lora" chooses)
	@$(MAKE) --no-print-directory test-units
	@$(MAKE) --no-print-directory test-chapters

test-units: install  ## all but the chapters - in parallel (WORKERS=2), then those that need the machine for themselves
	@$(TESTS) $(PARALLEL) -m "$(HERE) and not chapter and not serial" $(CHOSEN)
	@$(TESTS) -m "$(HERE) and not chapter and serial" $(CHOSEN)

test-chapters: install  ## the pages and their exercises, in profile smoke (CHAPTER="05 06")
	@$(TESTS) $(PARALLEL) -m "chapter" tests/course $(if $(CHAPTER),--chapter "$(CHAPTER)") $(CHOSEN)

test-long: install install-tpu book  ## the long proofs whole - kills, requests, every plan, every page - an hour or more
	@$(TESTS) -m "$(HERE) and long" $(CHOSEN)
	@JAX_PLATFORMS=cpu $(VENV)-tpu/bin/python -m pytest -m "tpu and long" tests/tpu $(PYTEST_ARGS) || test $$? -eq 5
	@$(TESTS) -m "browser and long" tests/browser $(CHOSEN)

lab: install  ## JupyterLab on the chapters
	@$(BIN)/jupyter lab chapters

serve: book  ## build the site and show it on http://127.0.0.1:8000 (PORT=)
	@echo "http://127.0.0.1:$(PORT)"; $(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

execute: install  ## run the chapters for real and record their outputs (CHAPTER=05)
	@$(BIN)/python tools/execute.py $(CHAPTER)

alone: install  ## each notebook alone in an empty folder, as on Colab (CHAPTER=05); runs the last commit
	@tools/run_alone.sh . $(CHAPTER)

sync: install  ## bring each .md and its .ipynb together, stamp the repository's address
	@$(BIN)/python tools/sync.py

student: install  ## the edition without answers, into _build/student (STUDENT=DIR)
	@$(BIN)/python tools/student.py $(STUDENT)

assignments: install  ## the graded assignments for nbgrader, into _build/assignments (REPOSITORY=the student edition's address)
	@$(BIN)/python tools/assignments.py $(if $(REPOSITORY),--repository "$(REPOSITORY)")

check: install  ## everything quick, under a minute - style, pairs, recorded outputs, links
	@$(BIN)/python tools/check.py

format: install  ## put the code into the one style
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

test-browser: book  ## the built site in a real Chromium
	@$(TESTS) -m browser tests/browser $(CHOSEN)

linkcheck: install  ## ask every link to another site (needs the network)
	@$(BIN)/python tools/linkcheck.py

install-peers:  ## torch, transformers and peft in an environment of their own, .venv-peers
	@$(RUN_PYTHON) tools/install.py --venv "$(VENV)-peers" --constraints none --requirements requirements-peers.txt

test-peers: install install-peers  ## the tests against torch, transformers and peft
	@$(TESTS) -m peers tests/peers $(CHOSEN)

install-tpu:  ## the TPU's compiler in an environment of its own, .venv-tpu (Linux on x86-64), for `python -m utils plan`
	@$(RUN_PYTHON) tools/install.py --venv "$(VENV)-tpu" --constraints "$(CONSTRAINTS)" --requirements requirements-tpu.txt

test-tpu: install-tpu  ## the tests that run the TPU's compiler (no TPU needed)
	@JAX_PLATFORMS=cpu $(VENV)-tpu/bin/python -m pytest --durations=30 -m tpu tests/tpu $(PYTEST_ARGS)

mirror: install  ## fill a classroom mirror of data and models (MIRROR=DIR)
	@$(BIN)/python -m utils mirror --to "$(MIRROR)"

constraints:  ## resolve constraints.txt again from requirements.txt (needs uv)
	@{ echo "# The tested set, one for Python 3.11, 3.12 and 3.13. Made by \`make constraints\`; do not edit by hand."; \
	uv pip compile --universal --fork-strategy fewest --python-version 3.11 requirements.txt \
	--quiet --upgrade --no-annotate --no-header; } > constraints.txt.new && mv constraints.txt.new constraints.txt

clean:  ## remove what was built (not .venv)
	rm -rf _build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
