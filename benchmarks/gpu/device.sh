#!/usr/bin/env bash
# Runs `farshore bench gpu` on a GPU machine that has Python 3.12, torch, triton, transformers and g++, but no network.
#
#   benchmarks/gpu/device.sh carry             here: puts wheels and the demo model, cut off, into .gpu/ (52 MiB)
#   benchmarks/gpu/device.sh run [--only ...]  there, with the tree and .gpu/: builds, then writes $OUT/gpu.json
set -euo pipefail
cd "$(dirname "$0")/../.."

# What such machines lacked, beside setuptools to build with. pip keeps an installed package that fits.
packages=("xxhash" "llguidance>=1.9,<2" "grpcio>=1.80" "grpcio-health-checking>=1.80" "grpcio-reflection>=1.80"
    "protobuf>=6.31.1,<8" "tokenizers>=0.21" "setuptools>=77" "pybind11>=2.11")

case ${1-} in
carry)
    exclude=$(git rev-parse --git-path info/exclude)
    grep -qx '/.gpu/' "$exclude" 2>/dev/null || echo '/.gpu/' >>"$exclude"
    python -P -m pip download --quiet --no-deps --dest .gpu/wheels --python-version 3.12 --only-binary=:all: \
        --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux_2_31_x86_64 "${packages[@]}"
    python -P -m farshore.benchmarks.gpu.truncated .gpu/model
    du -sh .gpu
    ;;
run)
    shift
    python3 -m venv --system-site-packages /tmp/farshore-gpu
    . /tmp/farshore-gpu/bin/activate
    pip install --quiet --no-index --find-links .gpu/wheels --no-deps "${packages[@]}"
    pip install --quiet --no-index --no-deps --no-build-isolation -e .
    farshore bench gpu --json --out "${OUT:-.}/gpu.json" --model .gpu/model "$@"
    ;;
*)
    sed -n '2,5s/^# \?//p' "$0"
    exit 2
    ;;
esac
