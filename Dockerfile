# fastppo with its trainer on a CUDA base. The build of this image has not been run yet.
#
#   docker build -t fastppo .
#   docker run --gpus all -v "$PWD":/workspace fastppo fastppo-train ppo.yaml

FROM nvidia/cuda:12.8.1-base-ubuntu24.04

# torch brings its own CUDA libraries. The compiler is for the CPU's operators, and for Triton, which compiles its
# launchers at run time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/venv
ENV PATH="$VIRTUAL_ENV/bin:$PATH"
RUN python3 -m venv "$VIRTUAL_ENV"

WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE constraints.txt ./
COPY kernels kernels
COPY fastppo fastppo
RUN pip install --no-cache-dir --constraint constraints.txt '.[train]'

WORKDIR /workspace
CMD ["fastppo-train", "--help"]
