# syntax=docker/dockerfile:1.7
# The gateway: no torch, no vLLM, no compiler. Build from the root of the repository.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# Dependencies first: they change less often than the code, and their layer is kept.
COPY docker/locks/build.txt docker/locks/gateway.txt docker/locks/
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/ep-serve \
    && python -m venv /opt/build \
    && /opt/build/bin/pip install --no-deps --require-hashes -r docker/locks/build.txt \
    && /opt/build/bin/pip --python /opt/ep-serve/bin/python install --no-deps --require-hashes -r docker/locks/gateway.txt
COPY pyproject.toml README.md LICENSE ./
COPY ep_serve ep_serve
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist . \
    && /opt/build/bin/pip --python /opt/ep-serve/bin/python install --no-deps /dist/*.whl

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="ep-serve gateway" \
      org.opencontainers.image.description="OpenAI-compatible gateway for ep-serve engines" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# A user with an entry in passwd; nothing of pip is left to install anything with.
RUN groupadd --gid 10001 ep-serve \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin ep-serve \
    && python -m pip uninstall --yes --quiet --root-user-action=ignore setuptools wheel pip \
    && mkdir /store && chown 10001:10001 /store
COPY --from=build /opt/ep-serve /opt/ep-serve
ENV PATH=/opt/ep-serve/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 8080 8081 9090
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=2)"]
ENTRYPOINT ["ep-serve"]
CMD ["gateway", "--config=/etc/ep-serve/gateway.json"]
