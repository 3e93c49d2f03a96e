# The whole pipeline on NVIDIA GPUs (a driver for CUDA 13). From the repository's root:
#   docker build -f docker/cuda.Dockerfile -t dphrl:cuda .
#   docker run --rm -it --gpus all --ipc=host -v "$PWD/runs:/app/runs" dphrl:cuda train demo-math
# This is the devel image, because DeepSpeed compiles its fused operators with nvcc on first use.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

# The archive keeps only the newest version of a package, so a pinned one would soon not be there.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        build-essential git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# The user is a number, so that Kubernetes can see that it is not root.
RUN useradd --create-home --uid 10001 dphrl \
    && mkdir -p /app/runs /opt/venv \
    && chown -R dphrl:dphrl /app /opt/venv
USER 10001
WORKDIR /app

# No GPU is visible while an image is built, so the backend is stated here.
ENV DPHRL_VENV=/opt/venv DPHRL_BACKEND=cuda PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1

# The slow layer depends on these three files alone: dphrl is installed in place from empty packages, and the code is
# copied into them afterwards.
COPY --chown=10001 pyproject.toml ./
COPY --chown=10001 docker/setup.sh docker/constraints-cuda.txt docker/
RUN mkdir dphrl actors cluster \
    && touch README.md LICENSE dphrl/__init__.py actors/__init__.py cluster/__init__.py \
    && docker/setup.sh

COPY --chown=10001 README.md LICENSE ./
COPY --chown=10001 dphrl dphrl
COPY --chown=10001 actors actors
COPY --chown=10001 cluster cluster
COPY --chown=10001 docker/healthcheck.py docker/

HEALTHCHECK --interval=30s --timeout=15s --start-period=120s --retries=5 CMD ["python", "docker/healthcheck.py"]
ENTRYPOINT ["dphrl"]
CMD ["--help"]
