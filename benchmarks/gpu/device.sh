#!/usr/bin/env bash
# Runs `farshore bench gpu` on a GPU machine that has Python 3.12, torch, triton, transformers and g++, but no network.
#
#   benchmarks/gpu/device.sh carry             here: puts wheels, native kernels and the demo model into .gpu/ (50 MiB)
#   benchmarks/gpu/device.sh run [--only ...]  there, with the tree and .gpu/: writes $OUT/gpu.json, section by section
#
# `carry` compiles the native kernels if a python3.12 is here (4 CPU minutes); otherwise `run` does.
set -euo pipefail
cd "$(dirname "$0")/../.."

# What such machines lacked, beside what the package is built with. pip keeps an installed package that fits.
packages=("xxhash" "llguidance>=1.9,<2" "grpcio>=1.80" "grpcio-health-checking>=1.80" "grpcio-reflection>=1.80"
    "protobuf>=6.31.1,<8" "tokenizers>=0.21" "setuptools>=77" "pybind11>=2.11")
modules=(attention_offload kernels/cpu kvstore)

# What the native modules are made from: their digest says whether carried ones are those of the tree.
sources() {
    find "${modules[@]/%//native}" setup.py -type f ! -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum
}

# Links the tree's folders into site-packages as the packages that pyproject.toml names.
packages_of_the_tree='
import sys, tomllib
from pathlib import Path
site, root = Path(sys.argv[1]), Path.cwd()
(site / "farshore").mkdir()
for file in (root / "farshore").glob("*.py"):
    (site / "farshore" / file.name).symlink_to(file)
folders = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
for package, folder in folders.items():
    if package.count(".") == 1:
        (site / package.replace(".", "/")).symlink_to(root / folder)
'

native() {
    local built
    built=$(mktemp -d)
    rm -rf .gpu/native
    mkdir -p .gpu/native
    python3.12 -m venv "$built"
    "$built/bin/pip" install --quiet "setuptools>=77" "pybind11>=2.11"
    "$built/bin/python" -P setup.py --quiet build_ext --build-temp "$built/temp" --build-lib "$built/lib" \
        >.gpu/native/log 2>&1
    for module in "${modules[@]}"; do
        mkdir -p ".gpu/native/$module"
        cp "$built/lib/farshore/$module"/_native.*.so ".gpu/native/$module/"
    done
    sources >.gpu/native/sources
    rm -rf "$built"
}

case ${1-} in
carry)
    mkdir -p .gpu
    rm -rf .gpu/wheels
    python -P -m pip download --quiet --no-deps --dest .gpu/wheels --python-version 3.12 --only-binary=:all: \
        --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux_2_31_x86_64 "${packages[@]}"
    python -P -m farshore.benchmarks.gpu.truncated .gpu/model
    if [ "$(sources)" = "$(cat .gpu/native/sources 2>/dev/null)" ]; then
        echo "native kernels: those of .gpu/native"
    elif python3.12 -c 'import ensurepip' 2>/dev/null; then
        native
    else
        rm -rf .gpu/native
        echo "native kernels: compiled there, since no python3.12 runs here" >&2
    fi
    du -sh .gpu
    ;;
run)
    shift
    environment=/tmp/farshore-gpu
    # A virtual environment sees the packages of the Python beneath it, but not those of another environment, in
    # which torch may be; and a system's Python may lack ensurepip.
    python3 -m venv --without-pip --clear "$environment"
    python3 -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' \
        >"$(echo "$environment"/lib/python3*/site-packages)/beneath.pth"
    install=(python3 -m pip --python "$environment/bin/python" install --quiet --no-index --no-deps)
    "${install[@]}" --find-links .gpu/wheels "${packages[@]}"
    python="$environment/bin/python"
    if [ "$(sources)" = "$(cat .gpu/native/sources 2>/dev/null)" ]; then
        for module in "${modules[@]}"; do
            cp ".gpu/native/$module"/_native.*.so "$module/"
        done
    else
        "$python" -P setup.py --quiet build_ext --inplace
    fi
    # An editable installation would compile in any case.
    "$python" -P -c "$packages_of_the_tree" "$(echo "$environment"/lib/python3*/site-packages)"
    "$python" -P -c 'import farshore.kernels.cpu._native' || echo "no native kernels: CPU shards will be slow" >&2
    exec "$python" -P -m farshore.client.cli.main \
        bench gpu --json --out "${OUT:-.}/gpu.json" --model .gpu/model "$@"
    ;;
*)
    sed -n '2,7s/^# \?//p' "$0"
    exit 2
    ;;
esac
