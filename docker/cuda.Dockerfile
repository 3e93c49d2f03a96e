# The whole pipeline on NVIDIA GPUs (a driver for CUDA 13). From the repository's root:
#   docker build -f docker/cuda.Dockerfile -t dphrl:cuda .
#   docker run --rm -it --gpus all --ipc=host -v "$PWD/runs:/app/runs" dphrl:cuda train demo-math
# CUDA's libraries come with torch, and the compiler (nvcc) that engines may want at run time with vLLM, so no devel image
# is needed. Triton and torch compile small programs when they are first used: that takes gcc and Python's headers.
FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04 AS base

# The archive keeps only the newest version of a package, so a pinned one would soon not be there.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        g++ gcc libc6-dev python3 python3-dev \
    && rm -rf /var/lib/apt/lists/*

# ---- the environment: a layer that changes with these files alone, not with the code
FROM base AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Without linters and test tools. No GPU is visible while an image is built, so the backend is stated.
ENV DPHRL_VENV=/opt/venv DPHRL_BACKEND=cuda DPHRL_DEV=0 PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1
WORKDIR /app
COPY pyproject.toml ./
COPY docker/setup.sh docker/sbom.py docker/constraints-cuda.txt docker/
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
ENV PATH=/opt/venv/bin:$PATH HOME=/home/dphrl \
    CUDA_HOME=/opt/venv/lib/python3.12/site-packages/nvidia/cu13
# Bytecode of the code: nobody could write it later.
RUN python -m compileall -q dphrl actors cluster
USER 10001

HEALTHCHECK --interval=30s --timeout=15s --start-period=120s --retries=5 CMD ["python", "docker/healthcheck.py"]
ENTRYPOINT ["dphrl"]
CMD ["--help"]
