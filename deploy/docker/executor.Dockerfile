# The executor, in two targets. From the repository's root, with BuildKit:
#   docker build -f deploy/docker/executor.Dockerfile --target gpu -t nanovllm-executor .
#   docker build -f deploy/docker/executor.Dockerfile --target cpu -t nanovllm-executor-cpu .
# Target gpu takes flash-attn from a wheel in deploy/docker/wheels/ or from a URL:
#   --build-arg FLASH_ATTN=flash-attn    or    --build-arg FLASH_ATTN=https://.../flash_attn-....whl
# Target cpu takes PyTorch without CUDA from PyTorch's index of CPU wheels:
#   --build-arg TORCH_INDEX=URL
# A private package index goes into a pip.conf outside the repository: --secret id=pip,src=pip.conf
# For builds that repeat exactly give both images by digest, NAME@sha256:...
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
# PyTorch's wheels bring the CUDA libraries; this image tells the container runtime which driver
# they need. Its Python is the distribution's, 3.12.
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-base-ubuntu24.04

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY LICENSE README.md pyproject.toml setup.py ./
COPY protos protos
COPY nanovllm nanovllm
COPY nanovllm_core nanovllm_core
COPY scheduler_service scheduler_service
COPY executor_service executor_service
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/root/.config/pip/pip.conf \
    pip wheel --no-deps --wheel-dir /dist .

FROM ${PYTHON_IMAGE} AS cpu-environment
WORKDIR /build
RUN python -m venv /opt/nanovllm
ENV PATH=/opt/nanovllm/bin:$PATH
COPY pyproject.toml deploy/docker/requirements.py ./
ARG TORCH_INDEX=
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/root/.config/pip/pip.conf \
    python requirements.py cpu tracing > requirements.txt \
    && pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --requirement requirements.txt
COPY --from=wheel /dist /dist
RUN pip install --no-index --no-deps /dist/*.whl && pip check

FROM ${CUDA_IMAGE} AS cuda
# Triton compiles the launcher of each kernel at run time, against Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
       ca-certificates gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM cuda AS gpu-environment
WORKDIR /build
RUN python3 -m venv /opt/nanovllm
ENV PATH=/opt/nanovllm/bin:$PATH
# The versions that docs/performance.md measures; Triton comes with PyTorch.
ARG TORCH=torch==2.11.0
COPY pyproject.toml deploy/docker/requirements.py ./
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/root/.config/pip/pip.conf \
    python requirements.py cpu gpu tracing --without torch --without flash-attn > requirements.txt \
    && echo "$TORCH" >> requirements.txt \
    && pip install --requirement requirements.txt
ARG FLASH_ATTN=
COPY deploy/docker/wheels /wheels
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/root/.config/pip/pip.conf \
    if [ -n "$FLASH_ATTN" ]; then \
      echo "$FLASH_ATTN" > flash-attn.txt \
      && pip install --only-binary :all: --find-links /wheels \
         --constraint requirements.txt --requirement flash-attn.txt; \
    fi
COPY --from=wheel /dist /dist
RUN pip install --no-index --no-deps /dist/*.whl && pip check

FROM ${PYTHON_IMAGE} AS cpu
LABEL org.opencontainers.image.title="nanovllm-grpc executor for CPUs" \
      org.opencontainers.image.description="Model, KV cache and sampling of nanovllm-grpc" \
      org.opencontainers.image.licenses="MIT"
# The folders exist with their owner so that new volumes in their place belong to the user.
RUN groupadd --gid 10001 nanovllm \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp nanovllm \
    && install --directory --owner=10001 --group=10001 \
       /var/cache/nanovllm/models /run/nanovllm
COPY --from=cpu-environment /opt/nanovllm /opt/nanovllm
ENV PATH=/opt/nanovllm/bin:$PATH \
    HOME=/tmp \
    HF_HOME=/var/cache/nanovllm/models/huggingface \
    NANOVLLM_ADDRESS=127.0.0.1:50052 \
    NANOVLLM_CACHE=/var/cache/nanovllm/models/embedded \
    NANOVLLM_EXECUTOR_DEVICE=cpu \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 50052 9402
STOPSIGNAL SIGTERM
# It answers only when the model is loaded; the start may include a download.
HEALTHCHECK --interval=10s --timeout=30s --start-period=30m CMD ["nanovllm", "health"]
ENTRYPOINT ["python", "-m", "executor_service"]

FROM cuda AS gpu
LABEL org.opencontainers.image.title="nanovllm-grpc executor for NVIDIA GPUs" \
      org.opencontainers.image.description="Model, kernels, KV cache and sampling of nanovllm-grpc" \
      org.opencontainers.image.licenses="MIT"
RUN groupadd --gid 10001 nanovllm \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp nanovllm \
    && install --directory --owner=10001 --group=10001 \
       /var/cache/nanovllm/models /var/cache/nanovllm/kernels /run/nanovllm
COPY --from=gpu-environment /opt/nanovllm /opt/nanovllm
ENV PATH=/opt/nanovllm/bin:$PATH \
    CUDA_CACHE_PATH=/var/cache/nanovllm/kernels/cuda \
    HOME=/tmp \
    HF_HOME=/var/cache/nanovllm/models/huggingface \
    NANOVLLM_ADDRESS=127.0.0.1:50052 \
    NANOVLLM_CACHE=/var/cache/nanovllm/models/embedded \
    NANOVLLM_EXECUTOR_DEVICE=cuda \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TRITON_CACHE_DIR=/var/cache/nanovllm/kernels/triton
USER 10001:10001
WORKDIR /tmp
EXPOSE 50052 9402
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=30s --start-period=30m CMD ["nanovllm", "health"]
ENTRYPOINT ["python", "-m", "executor_service"]
