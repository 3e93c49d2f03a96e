# The whole pipeline on a machine without a GPU. From the repository's root:
#   docker build -f docker/cpu.Dockerfile -t dphrl:cpu .
#   docker run --rm -it --shm-size=4g -v "$PWD/runs:/app/runs" dphrl:cpu train demo-math
FROM python:3.11-slim-bookworm

# Debian's archive keeps only the newest version of a package, so a pinned one would soon not be there.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential git \
    && rm -rf /var/lib/apt/lists/*

# The user is a number, so that Kubernetes can see that it is not root.
RUN useradd --create-home --uid 10001 dphrl \
    && mkdir -p /app/runs /opt/venv \
    && chown -R dphrl:dphrl /app /opt/venv
USER 10001
WORKDIR /app

ENV DPHRL_VENV=/opt/venv DPHRL_BACKEND=cpu PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1

# The slow layer depends on these three files alone: dphrl is installed in place from empty packages, and the code is
# copied into them afterwards.
COPY --chown=10001 pyproject.toml ./
COPY --chown=10001 docker/setup.sh docker/constraints-cpu.txt docker/
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
