# Every target does all its set-up on a machine with Python 3.10+, pip and make; `make help` lists them.
# A virtual environment is made in .venv at the first call; later calls only look at stamp files.

VENV ?= .venv
# The interpreter for the virtual environment; by default the first of the usual names that is new enough.
PYTHON ?=
# What is handed to pytest, for example: make test PYTEST_ARGS="-k savepoint -x"
PYTEST_ARGS ?=
# Most tests wait for workers and servers, so several files run at once, in their order; one file's tests share what they start.
AT_ONCE ?= -n 3 --dist loadfile --no-loadscope-reorder
# Which of examples/ make example starts.
NAME ?= fastapi_app
# What make soak runs on, and for how long; BROKER=alchemy is the database itself.
MINUTES ?= 10
DATABASE ?= sqlite
BROKER ?= filesystem
# What make bench-delivery measures: any of latency enqueue relay drain statements; all of them if it is empty.
PARTS ?=
# pytest's code for "no tests ran", accepted when arguments chose tests of one of the projects only.
NO_TESTS_OK := $(if $(strip $(PYTEST_ARGS)),5,0)

BIN := $(CURDIR)/$(VENV)/bin
STAMPS := $(VENV)/stamps
PROJECTS := pyproject.toml examples/pyproject.toml examples/ragline/pyproject.toml
# uv installs faster where it is present; pip does the same.
UV ?= $(shell command -v uv 2>/dev/null)
INSTALL := $(if $(UV),$(UV) pip install --python $(BIN)/python,$(BIN)/python -m pip install) --quiet
INSTALL_MINIMUM := $(if $(UV),$(UV) pip install,$(BIN)/python -m pip) --python $(CURDIR)/$(VENV)/minimum/bin/python $(if $(UV),,install) --quiet
CENTRAL_TESTS := tests/unit tests/packaging tests/delivery/test_sending.py tests/kit/test_sending.py tests/kit/test_joining.py

export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Tests and workers are hundreds of processes. Without bytecode each compiles all that it imports, which takes it seconds; pip writes
# that of what it installs, uv where it is told to.
unexport PYTHONDONTWRITEBYTECODE
export UV_COMPILE_BYTECODE := 1

.DEFAULT_GOAL := help
.PHONY: help demo example test minimum pythons soak celery-suite coverage lint ruff mypy pyright imports format bench bench-delivery bench-overhead docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMPS)/demo ## ingest and search real documents with ragline, on SQLite and without any server
	@$(BIN)/ragline demo

example: $(STAMPS)/examples ## start the worker and the application of examples/NAME, without any server
	@cd examples && $(BIN)/python -m $(NAME)

test: $(STAMPS)/test ## run all tests of the library and of the examples, on every server that answers
	@status=0; \
	for project in . examples examples/ragline; do \
		(cd $$project && $(BIN)/python -m pytest $(AT_ONCE) $(PYTEST_ARGS)); code=$$?; \
		[ $$code -eq 0 ] || [ $$code -eq $(NO_TESTS_OK) ] || status=$$code; \
	done; \
	exit $$status

minimum: $(STAMPS)/minimum ## build the packages, and run the library's central tests on what is installed, with the oldest dependencies
	@rm -rf dist build/sdist && mkdir -p build/sdist
	@$(BIN)/python -m build --no-isolation --outdir dist . >build/log.txt 2>&1 || { cat build/log.txt; exit 1; }
	@$(INSTALL_MINIMUM) --no-deps --force-reinstall dist/*.whl
	@tar -xzf dist/*.tar.gz -C build/sdist --strip-components=1
	cd build/sdist && $(CURDIR)/$(VENV)/minimum/bin/python -m pytest -n 3 -k "sqlite or test_imports" $(CENTRAL_TESTS)

pythons: $(STAMPS)/test ## run the tests that need no server on each other Python from 3.10 to 3.13 that is found
	@VENV=$(VENV) .ci/on-each-python

soak: $(STAMPS)/test ## kill at random for MINUTES on DATABASE and BROKER (names or URLs) and see that the accounts add up
	$(BIN)/python -m tests.soak --minutes $(MINUTES) --database $(DATABASE) --broker $(BROKER)

coverage: $(STAMPS)/test ## run the library's tests, workers included, and show what they never reach
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(PYTEST_ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

celery-suite: $(STAMPS)/celery-suite ## run Celery's own tests with SessionTask as the default task class; PARTS="quick", or "broker", on the database
	$(VENV)/celery-suite/bin/python -m tests.celery_suite $(PARTS)

lint: ruff mypy pyright imports ## check style, types and the direction of imports

ruff: $(STAMPS)/lint ## check style and format
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check .

mypy: $(STAMPS)/lint ## check types with mypy --strict
	$(BIN)/mypy
	cd examples && $(BIN)/mypy
	cd examples/ragline && $(BIN)/mypy

pyright: $(STAMPS)/lint ## check types with pyright, and that every public symbol has one
	$(BIN)/pyright
	@$(BIN)/pyright --verifytypes celery_alchemy --ignoreexternal >$(VENV)/verifytypes.txt || { cat $(VENV)/verifytypes.txt; exit 1; }

imports: $(STAMPS)/lint ## check that modules only import lower ones
	$(BIN)/lint-imports --no-logo
	cd examples/ragline && $(BIN)/lint-imports --no-logo

format: $(STAMPS)/lint ## put all files into the house's format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(STAMPS)/bench ## measure what the library promises of its cost, beside work by hand; needs PostgreSQL, Redis and RabbitMQ
	$(BIN)/python benchmarks/targets.py $(PARTS)

bench-overhead: $(STAMPS)/bench ## measure what a task costs beside the other ways to get a session
	$(BIN)/python benchmarks/overhead.py

bench-delivery: $(STAMPS)/bench ## measure sending on commit, the relay and once tasks; needs PostgreSQL, Redis and RabbitMQ
	$(BIN)/python benchmarks/delivery.py $(PARTS)

docs: $(STAMPS)/docs ## build the documentation into docs/_build/html; a warning is an error
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --builder html docs docs/_build/html
	@echo "the documentation is in docs/_build/html/index.html"

clean: ## remove the virtual environment and everything that was built
	rm -rf $(VENV) docs/_build build dist htmlcov .coverage .coverage.*
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	@for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
			echo "making $(VENV) with $$($$python --version)"; \
			$$python -m venv $(VENV) && exit 0; \
			rm -rf $(VENV); \
		fi; \
	done; \
	echo "no usable Python: 3.10 or newer with the venv module is needed (Debian: apt install python3-venv);" >&2; \
	echo "name one that is not on the path with: make PYTHON=/path/to/python3 ..." >&2; \
	exit 1

# Dependency groups need pip 25.1.
$(STAMPS)/pip: | $(BIN)/python
	@$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/demo: $(PROJECTS) $(STAMPS)/pip
	@echo "installing celery-alchemy and ragline"
	@$(INSTALL) -e . -e "examples/ragline[web]"
	@$(INSTALL) -e "examples/ragline[onnx]" || echo "no onnxruntime for this platform: ragline embeds with numpy"
	@touch $@

$(STAMPS)/examples: $(STAMPS)/demo
	@echo "installing what the examples use"
	@$(INSTALL) --group examples
	@touch $@

$(STAMPS)/test: $(STAMPS)/examples
	@echo "installing what the tests need"
	@$(INSTALL) --group test
	@$(INSTALL) --group drivers || echo "mysqlclient and asyncmy cannot be installed here: their tests are skipped"
	@$(INSTALL) --group browser || echo "no Playwright for this platform: ragline's page is not tested in a browser"
	@$(INSTALL) --group servers || echo "no PostgreSQL and Redis wheels for this platform: only servers that run are used"
	@touch $@

$(STAMPS)/lint: $(STAMPS)/test
	@echo "installing the linters and type checkers"
	@$(INSTALL) --group lint --group typing
	@touch $@

# An environment of its own: the pytest plugins of Celery's tests would change ours.
$(STAMPS)/celery-suite: $(PROJECTS) $(STAMPS)/pip
	@echo "installing what Celery's tests need"
	@$(BIN)/python -m venv $(VENV)/celery-suite
	@$(VENV)/celery-suite/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	@$(VENV)/celery-suite/bin/python -m pip install --quiet -e . --group celery-suite
	@touch $@

# Installed by the first environment's pip: the second one has none.
$(STAMPS)/minimum: pyproject.toml $(STAMPS)/pip
	@echo "installing the oldest dependencies"
	@$(INSTALL) --group package
	@rm -rf $(VENV)/minimum && $(BIN)/python -m venv --without-pip $(VENV)/minimum
	@$(INSTALL_MINIMUM) --group minimum
	@touch $@

$(STAMPS)/bench: $(STAMPS)/demo
	@echo "installing what is compared"
	@$(INSTALL) --group bench
	@touch $@

$(STAMPS)/docs: $(STAMPS)/demo
	@echo "installing Sphinx"
	@$(INSTALL) --group docs
	@touch $@
