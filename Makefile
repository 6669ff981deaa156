# The two commands, and what goes with them. Everything else is in scripts/, demo/ and tests/.

# Python of the demo and of the gates; scripts/bootstrap.sh makes it.
PYTHON ?= .venv/bin/python
# Where the demo's two environments live, and where its root file systems are cached.
DEMO_DIR ?= /opt/selfhost-delivery-demo
DELIVERY_CACHE ?= $(HOME)/.cache/selfhost-delivery
# Compose projects are <name>-staging and <name>-production.
DEMO_NAME ?= delivery-demo
DEMO_REGISTRY_PORT ?= 15443
DEMO_STAGING_PORT ?= 18081
DEMO_PRODUCTION_PORT ?= 18080
export DEMO_DIR DELIVERY_CACHE DEMO_NAME DEMO_REGISTRY_PORT DEMO_STAGING_PORT DEMO_PRODUCTION_PORT

.DEFAULT_GOAL := help
.PHONY: help demo demo-down test test-data test-hosts test-systemd lint soak bench-images bench-rollout bench-data build clean

help: ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: ## set this machine up and walk a small product through four releases, under load
	@scripts/bootstrap.sh demo
	@$(PYTHON) -B demo/demo.py run

demo-down: ## remove everything the demo made (KEEP_CACHE=1 keeps the cached root file systems)
	@python3 -B demo/demo.py down
	@scripts/teardown.sh

test: ## set this machine up and run every gate
	@scripts/bootstrap.sh test
	@tests/run.sh

test-data: ## snapshot sets of real databases, repositories elsewhere, restores; not part of `make test`
	@scripts/bootstrap.sh test
	@tests/run.sh data

test-hosts: ## releases over three hosts, reached over SSH; not part of `make test`
	@scripts/bootstrap.sh test
	@tests/run.sh hosts

test-systemd: ## app hosts and the registry role on hosts that systemd runs; no part of test
	@scripts/bootstrap.sh test
	@tests/run.sh systemd

lint: ## the quick gates alone
	@scripts/bootstrap.sh test
	@tests/run.sh lint ansible-lint

soak: ## rollouts with random faults, one after the other: SOAK_ROLLOUTS=200 SOAK_SEED=1
	@scripts/bootstrap.sh test
	@tests/run.sh soak

bench-images: ## image_promote beside crane, regctl, skopeo and docker; BENCH="--runs 3" and more: tests/bench/images.py --help
	@scripts/bootstrap.sh test
	@tests/bench/peers.sh
	@$(PYTHON) -B tests/bench/images.py $(BENCH)

bench-rollout: ## a rollout beside Kamal, docker-rollout, Swarm, Compose and a script, under load; BENCH="--runs 1 --only late": tests/bench/rollout.py --help
	@scripts/bootstrap.sh test
	@$(PYTHON) -B tests/bench/rollout.py $(BENCH)

bench-data: ## sets and restores beside kopia, restic and tar alone; BENCH="--runs 2 --only freeze": tests/bench/data.py --help
	@scripts/bootstrap.sh test
	@$(PYTHON) -B tests/bench/data.py $(BENCH)

build: ## the collection's tarball, in .cache/dist
	@scripts/bootstrap.sh demo
	@.venv/bin/ansible-galaxy collection build --force --output-path .cache/dist

clean: ## remove what was made in this checkout; run demo-down first
	@rm -rf .venv .ansible .nox .pytest_cache .mypy_cache .ruff_cache tests/output
	@rm -rf .cache/build .cache/dist .cache/mypy .cache/results .cache/sanity .cache/collections .cache/bench build/bench
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
