# Everything a fresh machine needs is made by the targets themselves; `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RATE ?= 1500
SECONDS ?= 20
KILL ?=
PROFILE ?= steady
LOAD_SECONDS ?= 60
SEED ?=
BYTES ?= 10000000
ONLY ?=
ROUNDS ?= 1
JOBS ?= 1

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "orderbus needs Python 3.11 or later; set PYTHON=python3.x"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "pip>=25.1"
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[all,sqlalchemy,fastapi]' --group dev
	@touch $@

.PHONY: setup
setup: $(VENV)/.ready ## Make the virtual environment

.PHONY: demo
demo: setup ## All services in one process, embedded PostgreSQL: RATE=1500 SECONDS=20
	$(BIN)/python -m services.demo --rate $(RATE) --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

.PHONY: demo-servers
demo-servers: setup ## A process per service on RabbitMQ, PostgreSQL, Redis: RATE= SECONDS= KILL=payment|random SEED=
	$(BIN)/python -m services.demo --servers --rate $(RATE) --seconds $(SECONDS) $(if $(KILL),--kill $(KILL)) $(if $(SEED),--seed $(SEED))

.PHONY: load
load: setup ## Load with thresholds that fail: PROFILE=steady|ramp|spike|soak RATE= LOAD_SECONDS=
	$(BIN)/python -m tests.load --profile $(PROFILE) --rate $(RATE) --seconds $(LOAD_SECONDS)

.PHONY: resilience
resilience: setup ## Payment is away under load, and comes back: what waited, what was lost
	$(BIN)/python -m tests.load.resilience

.PHONY: test
test: setup ## All tests, on real servers found or started
	$(BIN)/python -m pytest $(ARGS)

$(VENV)/.bench-ready: $(VENV)/.ready pyproject.toml
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --group bench
	@touch $@

.PHONY: bench-setup
bench-setup: $(VENV)/.bench-ready ## Install the peers that the bench compares with

$(VENV)/.docs-ready: $(VENV)/.ready pyproject.toml
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --group docs
	@touch $@

.PHONY: docs
docs: $(VENV)/.docs-ready ## The docs as a site in build/site; a broken link fails
	$(BIN)/python docs/build.py

$(VENV)/.release-ready: $(VENV)/.ready pyproject.toml
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --group release
	@touch $@

.PHONY: dist
dist: $(VENV)/.release-ready ## Wheel and sdist in dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist > /dev/null

.PHONY: release-check
release-check: dist ## The wheel, installed and tried on each Python that is here
	$(BIN)/python -m tests.release

.PHONY: api
api: setup ## Write down the public API in docs/api.txt; says what CHANGELOG.md does not mention
	$(BIN)/python -m tests.release.api

$(VENV)/.coverage-ready: $(VENV)/.ready pyproject.toml
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --group coverage
	@touch $@

.PHONY: coverage
coverage: $(VENV)/.coverage-ready ## All tests (or ARGS=tests/core), and the branches of orderbus/ that none of them takes
	$(BIN)/python -m tests.coverage $(ARGS)

$(VENV)/.mutants-ready: $(VENV)/.ready pyproject.toml
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --group mutants
	@touch $@

.PHONY: mutants
mutants: $(VENV)/.mutants-ready ## Change _core in many ways: do tests/core notice? ONLY=policy,work
	$(BIN)/python -m tests.core.mutants $(if $(ONLY),--only $(ONLY))

.PHONY: fuzz
fuzz: setup ## Damaged AMQP into our decoder: BYTES=10000000 SEED=
	$(BIN)/python -m tests.rabbitmq.fuzz --bytes $(BYTES) $(if $(SEED),--seed $(SEED))

.PHONY: faults
faults: RATE = 600
faults: setup ## Break everything, and count: ONLY=part,of,names SEED= ROUNDS=1 JOBS=1 RATE=600
	$(BIN)/python -m tests.faults --rounds $(ROUNDS) --jobs $(JOBS) --rate $(RATE) $(if $(ONLY),--only $(ONLY)) $(if $(SEED),--seed $(SEED))

.PHONY: compose-test
compose-test: setup ## The compose stack, really run on a local Docker engine
	$(BIN)/python -m tests.compose

.PHONY: check
check: setup ## ruff (with its rules for security), mypy, import-linter, pip-audit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.security.audit

.PHONY: audit
audit: setup ## Known vulnerabilities of what is installed; says so where they can't be looked up
	$(BIN)/python -m tests.security.audit

.PHONY: format
format: setup ## Format and sort imports
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format --quiet .

.PHONY: clean
clean: ## Remove the environment and what was built
	rm -rf $(VENV) build dist mutants *.egg-info .mypy_cache .ruff_cache .import_linter_cache
