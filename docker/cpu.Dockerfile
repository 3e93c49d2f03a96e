# The whole pipeline on a machine without a GPU. From the repository's root:
#   docker build -f docker/cpu.Dockerfile -t dphrl:cpu .
#   docker run --rm -it --shm-size=4g -v "$PWD/runs:/app/runs" dphrl:cpu train demo-math
# torch compiles kernels and DeepSpeed an operator when they are first used: that takes the compilers.
FROM python:3.11-slim-bookworm AS base

# The archive keeps only the newest version of a package, so a pinned one would soon not be there.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# ---- the environment: a layer that changes with these files alone, not with the code
FROM base AS build
# Without linters and test tools. No GPU is visible while an image is built, so the backend is stated.
ENV DPHRL_VENV=/opt/venv DPHRL_BACKEND=cpu DPHRL_DEV=0 PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1
WORKDIR /app
COPY pyproject.toml ./
COPY docker/setup.sh docker/sbom.py docker/constraints-cpu.txt docker/
# dphrl is installed in place from empty packages; the image has the code there.
RUN mkdir dphrl actors cluster \
    && touch README.md LICENSE dphrl/__init__.py actors/__init__.py cluster/__init__.py \
    && docker/setup.sh \
    && /opt/venv/bin/python docker/sbom.py -o /opt/venv/sbom.cdx.json

# ---- the image: the environment and the code belong to root, and the user that runs them cannot change them
FROM base
# The user is a number, so that Kubernetes can see that it is not root. Only the home folder, the run folder and /tmp
# are written to: with a read-only root file system, mount something on these three.
RUN useradd --create-home --uid 10001 dphrl \
    && mkdir -p /app/runs \
    && chown dphrl:dphrl /app/runs
COPY --from=build /opt/venv /opt/venv
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY dphrl dphrl
COPY actors actors
COPY cluster cluster
COPY docker/healthcheck.py docker/
ENV PATH=/opt/venv/bin:$PATH HOME=/home/dphrl
# Bytecode of the code: nobody could write it later.
RUN python -m compileall -q dphrl actors cluster
USER 10001

HEALTHCHECK --interval=30s --timeout=15s --start-period=120s --retries=5 CMD ["python", "docker/healthcheck.py"]
ENTRYPOINT ["dphrl"]
CMD ["--help"]
