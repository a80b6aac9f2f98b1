# One target, one job. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/finetune-operator
TOOLS := $(CACHE)/tools
MDBOOK := 0.5.4
TARGET := $(or $(CARGO_TARGET_DIR),target)
export PATH := $(TOOLS)/bin:$(PATH)

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: test
test: tools ## Install what the tests need and run all of them (a real Kubernetes too: needs root)
	tests/tools/run-tests

.PHONY: test-quick
test-quick: tools ## All tests that need no cluster
	tests/tools/run-tests --quick

.PHONY: test-faults
test-faults: tools ## Only the longest part of them: lost and drained nodes, absent servers
	tests/tools/run-tests --faults

.PHONY: test-diffusers
test-diffusers: ## Let diffusers and peft read the LoRA (installs PyTorch into the cache folder)
	tests/diffusers/run

.PHONY: cluster-up
cluster-up: ## Build (once) and start a real Kubernetes on this machine
	tests/cluster/cluster build
	tests/cluster/cluster up 2

.PHONY: cluster-down
cluster-down: ## Stop it and delete its state
	tests/cluster/cluster down

.PHONY: bench
bench: ## The training step, alone and beside PyTorch where it is installed (docs/benchmarks.md)
	cargo bench --bench step

.PHONY: cuda
cuda: ## Build with GPU kernels (fetches NVIDIA's compiler from PyPI into the cache folder; needs no GPU)
	tools/cuda/toolkit
	cargo build --release --features cuda
	cp "$$(ls -t $(TARGET)/release/build/finetune-compute-*/out/kernels.log | head -n 1)" $(TARGET)/release/kernels.log

.PHONY: tools
tools: ## Install the servers that the tests start (into the cache folder)
	tests/tools/install-servers

.PHONY: check
check: fmt-check paths clippy clippy-alone doc docs generated deny ## Format, dead paths, lints for each feature set, docs, generated files, licences

.PHONY: fmt-check
fmt-check: ## Check the format
	cargo fmt --all --check

CLUSTER_TESTS := --test admission --test controller --test e2e --test faults

# The release profile here, too: build scripts and macros are compiled once for lints, documentation, binaries and tests.
.PHONY: clippy
clippy: ## Lints, with every feature
	FINETUNE_CUDA_ARCHS=none cargo clippy --release --features cuda --workspace --lib --bins --benches -- -D warnings
	FINETUNE_CUDA_ARCHS=none cargo clippy --release --features cuda --workspace --tests $(CLUSTER_TESTS) -- -D warnings $(addprefix -A clippy::,unwrap_used panic print_stderr expect_used unwrap_in_result unnecessary_debug_formatting)

.PHONY: clippy-alone
clippy-alone: ## Lints of the operator without the trainer, and of the trainer without the operator
	cargo clippy --release --no-default-features --features operator --lib --bins -p finetune -p finetune-cli -p finetune-operator -- -D warnings
	cargo clippy --release --no-default-features --features train --lib --bins -p finetune -p finetune-cli -p finetune-train -- -D warnings

.PHONY: doc
doc: ## Build the API documentation; broken links are errors
	RUSTDOCFLAGS="-D warnings" cargo doc --release --no-deps --workspace --lib

.PHONY: docs
docs: $(TOOLS)/bin/mdbook-$(MDBOOK) ## Build the documentation as a book with search: target/book/index.html
	$< build docs

# Without "serve" and "watch": half the crates.
$(TOOLS)/bin/mdbook-$(MDBOOK):
	cargo install --quiet --debug --locked --no-default-features --features search --root $(TOOLS)/mdbook-$(MDBOOK) mdbook@$(MDBOOK)
	ln -sf $(TOOLS)/mdbook-$(MDBOOK)/bin/mdbook $@

.PHONY: paths
paths: ## Check that paths and links in Markdown and comments lead somewhere
	tools/check-paths

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
	cargo install --quiet --debug --locked --root $(TOOLS) cargo-deny@0.20.2

.PHONY: quickstart
quickstart: ## Train the quickstart's LoRA on this machine
	cargo run --release -- run examples/quickstart/job.yaml --bucket s3://quickstart=examples/quickstart/bucket
