# syntax=docker/dockerfile:1.7
# The engine without a GPU, for trials and tests. Build from the root of the repository.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /app
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# Where PyTorch's CPU wheels are.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY docker/locks/build.txt docker/locks/engine-cpu.txt docker/locks/
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv .venv \
    && python -m venv /opt/build \
    && /opt/build/bin/pip install --no-deps --require-hashes -r docker/locks/build.txt \
    && .venv/bin/pip install --no-deps --require-hashes --extra-index-url "${TORCH_INDEX}" -r docker/locks/engine-cpu.txt
# The registry's torchvision and its like are built for CUDA: the set-up script mends what breaks.
COPY scripts/setup_env.py scripts/
RUN PYTHONPATH=scripts .venv/bin/python -c "import setup_env; setup_env.repair_and_check()"
COPY pyproject.toml README.md LICENSE ./
COPY ep_serve ep_serve
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist . \
    && .venv/bin/pip install --no-deps --no-index /dist/*.whl \
    && .venv/bin/pip uninstall --yes --quiet pip

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="ep-serve engine (CPU)" \
      org.opencontainers.image.description="vLLM for CPUs with audio-visual token reduction" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# The compiler stays: torch.compile generates C++ on a CPU. libnuma and libgomp are vLLM's.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libgomp1 libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 ep-serve \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /scratch --shell /usr/sbin/nologin ep-serve \
    && mkdir /scratch /models && chown 10001:10001 /scratch /models
COPY --from=build /app/.venv /app/.venv
ENV PATH=/app/.venv/bin:$PATH \
    HOME=/scratch USER=ep-serve VLLM_CACHE_ROOT=/scratch/vllm TORCHINDUCTOR_CACHE_DIR=/scratch/torchinductor \
    HF_HOME=/scratch/huggingface XDG_CACHE_HOME=/scratch/cache \
    VLLM_NO_USAGE_STATS=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /scratch
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["ep-serve"]
CMD ["serve", "/models", "--host=0.0.0.0"]
