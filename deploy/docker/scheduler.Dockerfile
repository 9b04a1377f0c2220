# The scheduler: no PyTorch, no GPU. From the repository's root, with BuildKit:
#   docker build -f deploy/docker/scheduler.Dockerfile -t nanovllm-scheduler .
# A private package index goes into a pip.conf outside the repository: --secret id=pip,src=pip.conf
# For builds that repeat exactly: --build-arg PYTHON_IMAGE=python@sha256:...
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

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

FROM ${PYTHON_IMAGE} AS environment
WORKDIR /build
RUN python -m venv /opt/nanovllm
ENV PATH=/opt/nanovllm/bin:$PATH
COPY pyproject.toml deploy/docker/requirements.py ./
# gguf converts the embedded models; without it a scheduler that starts alone could not read one.
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/root/.config/pip/pip.conf \
    python requirements.py cpu gateway tracing --without torch > requirements.txt \
    && pip install --requirement requirements.txt
COPY --from=wheel /dist /dist
RUN pip install --no-index --no-deps /dist/*.whl && pip check

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="nanovllm-grpc scheduler" \
      org.opencontainers.image.description="Public gRPC API, tokenizer and scheduling of nanovllm-grpc" \
      org.opencontainers.image.licenses="MIT"
# The folders exist with their owner so that new volumes in their place belong to the user.
RUN groupadd --gid 10001 nanovllm \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp nanovllm \
    && install --directory --owner=10001 --group=10001 \
       /var/cache/nanovllm/models /run/nanovllm
COPY --from=environment /opt/nanovllm /opt/nanovllm
ENV PATH=/opt/nanovllm/bin:$PATH \
    HOME=/tmp \
    HF_HOME=/var/cache/nanovllm/models/huggingface \
    NANOVLLM_ADDRESS=127.0.0.1:50051 \
    NANOVLLM_CACHE=/var/cache/nanovllm/models/embedded \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 50051 9401
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=30s --start-period=60s CMD ["nanovllm", "health"]
ENTRYPOINT ["python", "-m", "scheduler_service"]
