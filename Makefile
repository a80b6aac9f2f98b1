# One target, one job. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/finetune-operator
TOOLS := $(CACHE)/tools
export PATH := $(TOOLS)/bin:$(PATH)

# The release profile everywhere: numeric tests need it, and one build of the dependencies serves the quickstart and the tests.
CARGO_TEST := cargo test --release

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: test
test: tools ## Install what the tests need and run all of them
	$(CARGO_TEST)

.PHONY: tools
tools: ## Install the servers that the tests start (into the cache folder)
	tests/tools/install-servers

.PHONY: check
check: fmt-check clippy doc generated deny ## Format, lints for each feature set, docs, generated files, licences

.PHONY: fmt-check
fmt-check: ## Check the format
	cargo fmt --check

.PHONY: clippy
clippy: ## Lints, for each feature set
	cargo clippy --all-targets -- -D warnings
	cargo clippy --no-default-features --features operator --lib --bins -- -D warnings
	cargo clippy --no-default-features --features train --lib --bins -- -D warnings

.PHONY: doc
doc: ## Build the API documentation; broken links are errors
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --lib

.PHONY: generate
generate: ## Write the generated files: CRD, the chart's copy, docs/reference
	tests/tools/generate

.PHONY: generated
generated: ## Check that the generated files are current
	tests/tools/generate --check

.PHONY: deny
deny: $(TOOLS)/bin/cargo-deny ## Check licences, banned crates and sources
	cargo deny check bans licenses sources

$(TOOLS)/bin/cargo-deny:
	cargo install --quiet --locked --root $(TOOLS) cargo-deny@0.20.2

.PHONY: quickstart
quickstart: ## Train the quickstart's LoRA on this machine
	cargo run --release -- run examples/quickstart/job.yaml --bucket s3://quickstart=examples/quickstart/bucket
