# Podkeel: `make run` shows a pod running, `make test` runs every test; both set up what they need.
.DEFAULT_GOAL := help
.PHONY: help install setup test test-debian13 test-vm deb test-deb lint run bench check clean
SHELL := /bin/bash
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin
# Bytecode is kept: without it each process that a test starts compiles the whole agent.
unexport PYTHONDONTWRITEBYTECODE

PYTHON_BIN := .venv/bin/python

help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## install what it takes to run Podkeel: Debian packages, .venv, the protocol stubs
	@scripts/setup.sh run

setup: ## install what it takes to build, test and measure Podkeel as well
	@scripts/setup.sh

run: install ## start an agent and run the sample pod until Ctrl-C; RUN_ONCE=1 ends and cleans up; ARGS="…" go to the agent
	@$(PYTHON_BIN) scripts/run_demo.py $(ARGS)

test: $(if $(TESTS),lint,setup) ## check style and types, then run every test (as root); TESTS="…" names some
	@scripts/test.sh $(TESTS)

test-debian13: ## test on Debian 13 (its Python, crun, runc and conmon) in a root of its own (root); TESTS="…" names some
	@scripts/test_debian13.sh $(TESTS)

test-vm: setup ## test on Debian's kernel with systemd, cgroup v2 and AppArmor in a virtual machine (root, 30 minutes); SUITE=trixie for Debian 13
	@$(PYTHON_BIN) -m tests.vm $(if $(SUITE),--debian $(SUITE)) $(ARGS)

deb: ## build the Debian package for Debian 12 and 13: dist/podkeel_VERSION_amd64.deb
	@python3 scripts/deb/build.py

test-deb: setup deb ## install, upgrade, remove and purge the package in roots of Debian 12 and 13 (root); SUITES="trixie" for one
	@scripts/test_deb.sh $(SUITES)

lint: setup ## check style and types only
	@scripts/lint.sh

bench: setup ## measure calls, networks and pulls; PEER=containerd adds it; ARGS="…" are passed on and name what to measure
	@$(PYTHON_BIN) -m tests.bench $(ARGS)
ifeq ($(ARGS),)
	@$(PYTHON_BIN) -m tests.bench --network
	@$(PYTHON_BIN) -m tests.bench --pull
	@$(PYTHON_BIN) -m pytest -q tests/bench
endif

check: install ## say what on this host works and what is missing
	@$(PYTHON_BIN) -m cli.main check $(ARGS)

clean: ## remove what was built here; the packages stay
	@rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -path ./.git -prune -o \( -name '__pycache__' -o -name '*_pb2.py' -o -name '*_pb2.pyi' \) -print0 | xargs -0 rm -rf
