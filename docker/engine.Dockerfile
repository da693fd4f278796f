# syntax=docker/dockerfile:1.7
# The engine on GPUs: vLLM's own image and this project's plug-in. Build from the root of the
# repository; give VLLM_DIGEST=sha256:... for a build that can be repeated.
ARG VLLM_TAG=v0.32.0
ARG VLLM_DIGEST=
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
COPY docker/locks/build.txt docker/locks/
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/build \
    && /opt/build/bin/pip install --no-deps --require-hashes -r docker/locks/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY ep_serve ep_serve
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist .

# hadolint ignore=DL3006
FROM vllm/vllm-openai:${VLLM_TAG}${VLLM_DIGEST:+@${VLLM_DIGEST}}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="ep-serve engine" \
      org.opencontainers.image.description="vLLM with audio-visual token reduction" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# The compiler of the base stays: Triton builds its launchers with it when kernels are first used.
# The user has an entry in passwd because torch asks for the name that belongs to the uid.
RUN groupadd --gid 10001 ep-serve \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /scratch --shell /usr/sbin/nologin ep-serve \
    && mkdir /scratch /models && chown 10001:10001 /scratch /models
COPY docker/locks/engine.txt /tmp/engine.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip install --no-deps --require-hashes -r /tmp/engine.txt && rm /tmp/engine.txt
RUN --mount=type=bind,from=build,source=/dist,target=/dist \
    python3 -m pip install --no-deps --no-cache-dir --no-index /dist/*.whl \
    && python3 -c "from importlib.metadata import requires, version; assert version('vllm').startswith('0.32.'); import av"
ENV HOME=/scratch USER=ep-serve VLLM_CACHE_ROOT=/scratch/vllm TORCHINDUCTOR_CACHE_DIR=/scratch/torchinductor \
    TRITON_CACHE_DIR=/scratch/triton HF_HOME=/scratch/huggingface XDG_CACHE_HOME=/scratch/cache \
    VLLM_NO_USAGE_STATS=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /scratch
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["ep-serve"]
CMD ["serve", "/models", "--host=0.0.0.0"]
