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
	tests/run

.PHONY: test-quick
test-quick: tools ## All tests that need no cluster
	tests/run --quick

.PHONY: test-cluster
test-cluster: tools ## All tests that need one; make test-cluster TESTS=controller::leader for some of them
	tests/run --cluster $(TESTS)

.PHONY: test-diffusers
test-diffusers: ## Let diffusers and peft read the LoRA (installs PyTorch into the cache folder)
	reference/check-lora

.PHONY: cluster-build
cluster-build: ## Build (once) a real Kubernetes, Helm and Kueue into the cache folder
	tests/testbed/cluster build-kueue

.PHONY: cluster-up
cluster-up: cluster-build ## Start it on this machine
	tests/testbed/cluster up 2

.PHONY: cluster-down
cluster-down: ## Stop it and delete its state
	tests/testbed/cluster down

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
	tests/testbed/install-servers

# `.ci/run` builds them beside the checks that need none.
.PHONY: cargo-tools
cargo-tools: $(TOOLS)/bin/cargo-deny $(TOOLS)/bin/mdbook-$(MDBOOK)

$(TOOLS)/bin/cargo-deny:
	$(call cargo-install,cargo-deny@0.20.2)

# Without "serve" and "watch": half the crates.
$(TOOLS)/bin/mdbook-$(MDBOOK):
	$(call cargo-install,--no-default-features --features search mdbook@$(MDBOOK))
	ln -sf mdbook $@

# One installation at a time; what another one has just installed is done.
define cargo-install
mkdir -p $(TOOLS)/bin
flock $(TOOLS)/.cargo-install env -u CARGO_TARGET_DIR cargo install --quiet --debug --locked --root $(TOOLS) $(1)
endef

.PHONY: check
check: fmt-check paths clippy clippy-alone doc generated docs deny ## Format, dead paths, lints for each feature set, docs, generated files, licences

.PHONY: fmt-check
fmt-check: ## Check the format
	cargo fmt --all --check


# The release profile here, too: build scripts and macros are compiled once for lints, documentation, binaries and tests.
.PHONY: clippy
clippy: ## Lints, with every feature
	FINETUNE_CUDA_ARCHS=none cargo clippy --release --features cuda --workspace --lib --bins --benches -- -D warnings
	FINETUNE_CUDA_ARCHS=none cargo clippy --release --features cuda --workspace --tests --test cluster -- -D warnings $(addprefix -A clippy::,unwrap_used panic print_stderr expect_used unwrap_in_result unnecessary_debug_formatting)

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

.PHONY: paths
paths: ## Check that paths and links in Markdown and comments lead somewhere
	tools/check-paths

.PHONY: generate
generate: ## Write the generated files: CRD, the chart's copy, docs/reference
	tools/generate

.PHONY: generated
generated: ## Check that the generated files are current
	tools/generate --check

.PHONY: deny
deny: $(TOOLS)/bin/cargo-deny ## Check licences, banned crates and sources
	cargo deny check bans licenses sources

.PHONY: quickstart
quickstart: ## Train the quickstart's LoRA on this machine
	cargo run --release -- run examples/quickstart/job.yaml --bucket s3://quickstart=examples/quickstart/bucket
