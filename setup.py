"""Builds the native modules if there is a C++ compiler. All other settings are in pyproject.toml."""

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, setup

RUNTIME = "kernels/cpu/native"
"""All three modules include headers of its ``runtime/``."""

MODULES = {
    "farshore.attention_offload._native": "attention_offload/native",
    "farshore.kernels.cpu._native": "kernels/cpu/native",
    "farshore.kvstore._native": "kvstore/native",
}


def extension(name: str, folder: str) -> Extension:
    return Extension(
        name,
        sources=sorted(str(path) for path in Path(folder).rglob("*.cpp")),
        depends=sorted(str(path) for root in (folder, RUNTIME) for path in Path(root).rglob("*.h")),
        include_dirs=[folder, RUNTIME],
        # No -march: the files of kernels/cpu/native/simd enable their instruction sets themselves, and the
        # module chooses one at import.
        extra_compile_args=[
            "-std=c++20",
            "-O3",
            "-g0",
            "-Wno-psabi",
            "-fno-math-errno",
            "-fno-trapping-math",
        ],
        extra_link_args=["-pthread"],
        # Without a compiler the installation goes on. PyTorch then does the work, and logs what that costs.
        optional=True,
    )


# setuptools alone compiles one file after another, and the file of one instruction set takes up to a minute.
with ParallelCompile():
    setup(ext_modules=[extension(name, folder) for name, folder in MODULES.items()])
