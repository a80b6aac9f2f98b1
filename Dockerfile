# Two images, both with one binary, the libraries that it needs and certificates. Non-root, no shell.
#
#   operator, and trainer for the CPU:  docker build -t ghcr.io/finetune-operator/finetune-operator:0.1.0 .
#   trainer for NVIDIA GPUs:            docker build --target trainer-cuda -t ghcr.io/finetune-operator/finetune-trainer:0.1.0 .
FROM rust:1.95-slim-bookworm AS sources
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates g++ make pkg-config python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .

FROM sources AS build
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --profile production --locked --bin finetune \
 && deploy/image/rootfs target/production/finetune /rootfs

# The compiler and the matrix library come from NVIDIA's wheels. The driver comes from the node, with its container runtime.
FROM sources AS build-cuda
RUN tools/cuda/toolkit \
 && python3 -m venv /wheels \
 && /wheels/bin/pip install --quiet --no-deps nvidia-cublas==13.1.1.3
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target-cuda \
    cargo build --profile production --locked --features cuda --bin finetune --target-dir target-cuda \
 && deploy/image/rootfs target-cuda/production/finetune /rootfs /wheels/lib/python3*/site-packages/nvidia/cu13/lib/libcublasLt.so.13

FROM scratch AS trainer-cuda
COPY --from=build-cuda /rootfs/ /
ENV LD_LIBRARY_PATH=/usr/local/cuda/lib64:/usr/local/nvidia/lib64:/usr/lib64
ENV NVIDIA_VISIBLE_DEVICES=all
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:65532
ENTRYPOINT ["/finetune"]

FROM scratch AS operator
COPY --from=build /rootfs/ /
USER 65532:65532
ENTRYPOINT ["/finetune"]
