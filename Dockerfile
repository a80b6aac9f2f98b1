# The image of the operator and of the CPU trainer: one binary, its C library, certificates. Non-root, no shell.
#
#   docker build -t ghcr.io/finetune-operator/finetune-operator:0.1.0 .
FROM rust:1.95-slim-bookworm AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates g++ make pkg-config \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --release --locked --bin finetune \
 && deploy/image/rootfs target/release/finetune /rootfs

FROM scratch
COPY --from=build /rootfs/ /
USER 65532:65532
ENTRYPOINT ["/finetune"]
