# syntax=docker/dockerfile:1.7
# Three images, of which the last is the default (docs/install.md):
#   cpu      the whole path on two CPU cores; its command is the quickstart
#   sglang   NVIDIA GPUs, rollouts by SGLang
#   vllm     NVIDIA GPUs, rollouts by vLLM, which asks for another torch than SGLang
# Python packages are pinned in containers/*.txt, by tools/lock_images.py from the ranges of setup.py.

ARG CPU_IMAGE=debian:bookworm-20251229-slim
# With the CUDA that torch is built for: apex refuses another. Triton and FlashInfer compile at run time, hence `devel`.
ARG CUDA_IMAGE=nvidia/cuda:13.0.3-cudnn-devel-ubuntu24.04
# Gives the tested Python to Ubuntu, which has another.
ARG PYTHON_IMAGE=python:3.11.15-slim-bookworm


FROM ${CPU_IMAGE} AS cpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Without docker-clean, which would empty the cache.
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,target=/var/lib/apt/lists,sharing=locked \
    rm -f /etc/apt/apt.conf.d/docker-clean \
    && apt-get update \
    && apt-get install -y --no-install-recommends \
        libnuma1=2.0.16-* \
        python3.11=3.11.2-* \
        python3.11-venv=3.11.2-* \
        tini=0.19.0-* \
    && useradd --create-home --no-log-init --uid 10001 fipo \
    && install --directory --owner=fipo --group=fipo /opt/fipo_megatron /opt/fipo_megatron/runs
WORKDIR /opt/fipo_megatron
USER 10001:10001
# What decides which packages are installed: their layer outlives changes of the sources.
COPY --chown=fipo:fipo pyproject.toml setup.py ./
COPY --chown=fipo:fipo containers/cpu.txt containers/
COPY --chown=fipo:fipo tools/install.py tools/lock_images.py tools/
COPY --chown=fipo:fipo fipo_megatron/__init__.py fipo_megatron/
RUN --mount=type=cache,target=/home/fipo/.cache/pip,uid=10001,gid=10001 \
    PIP_CONSTRAINT=containers/cpu.txt python3.11 tools/install.py \
    && .venv/bin/python tools/lock_images.py cpu --check
COPY --chown=fipo:fipo . .
ENV PATH=/opt/fipo_megatron/.venv/bin:$PATH
HEALTHCHECK --interval=10m --timeout=2m --start-period=1m --retries=2 \
    CMD ["python", "tools/check_health.py"]
# An init process reaps what Ray and the engines leave, and hands signals on.
ENTRYPOINT ["tini", "--"]
CMD ["examples/quickstart_cpu/run.sh"]


FROM ${PYTHON_IMAGE} AS python


FROM ${CUDA_IMAGE} AS cuda
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
COPY --from=python /usr/local /usr/local
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked \
    --mount=type=cache,target=/var/lib/apt/lists,sharing=locked \
    rm -f /etc/apt/apt.conf.d/docker-clean \
    && ldconfig \
    && apt-get update \
    && apt-get install -y --no-install-recommends \
        build-essential=12.10* \
        ca-certificates=2024* \
        git=1:2.43.0-* \
        libffi8=3.4.6-* \
        libnuma1=2.0.18-* \
        libsqlite3-0=3.45.1-* \
        tini=0.19.0-* \
    && useradd --create-home --no-log-init --uid 10001 fipo \
    && install --directory --owner=fipo --group=fipo /opt/fipo_megatron /opt/fipo_megatron/runs
WORKDIR /opt/fipo_megatron
USER 10001:10001
ENV PATH=/opt/fipo_megatron/.venv/bin:$PATH
# Of the GPUs to run on: the extensions are compiled for these alone.
ARG CUDA_ARCHITECTURES=9.0
# Compilers at once; each takes some GB of memory.
ARG MAX_JOBS=8
# NVIDIA's, which no package index has: its master of September 2026.
ARG APEX_COMMIT=575968bc1f9127ccd61003a681472a83af4ff1a1


FROM cuda AS sglang
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ARG ENGINE=sglang
COPY --chown=fipo:fipo containers/${ENGINE}.txt containers/
RUN --mount=type=cache,target=/home/fipo/.cache/pip,uid=10001,gid=10001 \
    python3.11 -m venv .venv \
    && pip install --constraint "containers/${ENGINE}.txt" pip setuptools wheel \
    && pip install --constraint "containers/${ENGINE}.txt" ninja packaging pybind11 torch
# Both extensions from source, Transformer Engine's because it would fetch a binary of its own choice; without
# isolation, which would bring another torch to compile against.
RUN --mount=type=cache,target=/home/fipo/.cache/pip,uid=10001,gid=10001 \
    APEX_CPP_EXT=1 APEX_CUDA_EXT=1 TORCH_CUDA_ARCH_LIST="${CUDA_ARCHITECTURES}" \
    pip install --no-build-isolation --no-deps "apex @ git+https://github.com/NVIDIA/apex.git@${APEX_COMMIT}" \
    && NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE \
    NVTE_CUDA_ARCHS="$(echo "${CUDA_ARCHITECTURES}" | tr -d .)" \
    pip install --no-build-isolation --constraint "containers/${ENGINE}.txt" transformer-engine-torch
COPY --chown=fipo:fipo pyproject.toml setup.py ./
COPY --chown=fipo:fipo tools/lock_images.py tools/
COPY --chown=fipo:fipo fipo_megatron/__init__.py fipo_megatron/
RUN --mount=type=cache,target=/home/fipo/.cache/pip,uid=10001,gid=10001 \
    pip install --constraint "containers/${ENGINE}.txt" --build-constraint "containers/${ENGINE}.txt" \
        --editable ".[cuda,${ENGINE},modelopt,trackers]" \
    && python tools/lock_images.py "${ENGINE}" --check
COPY --chown=fipo:fipo . .
HEALTHCHECK --interval=10m --timeout=2m --start-period=1m --retries=2 \
    CMD ["python", "tools/check_health.py", "--gpu"]
ENTRYPOINT ["tini", "--"]
CMD ["python", "tools/train.py", "--help"]


# The same lines for the other engine: a build makes only the stages that its target needs.
FROM cuda AS vllm
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ARG ENGINE=vllm
COPY --chown=fipo:fipo containers/${ENGINE}.txt containers/
RUN --mount=type=cache,target=/home/fipo/.cache/pip,uid=10001,gid=10001 \
    python3.11 -m venv .venv \
    && pip install --constraint "containers/${ENGINE}.txt" pip setuptools wheel \
    && pip install --constraint "containers/${ENGINE}.txt" ninja packaging pybind11 torch
RUN --mount=type=cache,target=/home/fipo/.cache/pip,uid=10001,gid=10001 \
    APEX_CPP_EXT=1 APEX_CUDA_EXT=1 TORCH_CUDA_ARCH_LIST="${CUDA_ARCHITECTURES}" \
    pip install --no-build-isolation --no-deps "apex @ git+https://github.com/NVIDIA/apex.git@${APEX_COMMIT}" \
    && NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE \
    NVTE_CUDA_ARCHS="$(echo "${CUDA_ARCHITECTURES}" | tr -d .)" \
    pip install --no-build-isolation --constraint "containers/${ENGINE}.txt" transformer-engine-torch
COPY --chown=fipo:fipo pyproject.toml setup.py ./
COPY --chown=fipo:fipo tools/lock_images.py tools/
COPY --chown=fipo:fipo fipo_megatron/__init__.py fipo_megatron/
RUN --mount=type=cache,target=/home/fipo/.cache/pip,uid=10001,gid=10001 \
    pip install --constraint "containers/${ENGINE}.txt" --build-constraint "containers/${ENGINE}.txt" \
        --editable ".[cuda,${ENGINE},modelopt,trackers]" \
    && python tools/lock_images.py "${ENGINE}" --check
COPY --chown=fipo:fipo . .
HEALTHCHECK --interval=10m --timeout=2m --start-period=1m --retries=2 \
    CMD ["python", "tools/check_health.py", "--gpu"]
ENTRYPOINT ["tini", "--"]
CMD ["python", "tools/train.py", "--help"]
