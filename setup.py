"""Builds the native modules where there is a compiler; everything else is in pyproject.toml."""

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, setup

RUNTIME = "kernels/cpu/native"
"""The headers in its ``runtime/`` serve all three modules."""

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
        # A file that wants an instruction set names it itself; the choice is made at import.
        extra_compile_args=[
            "-std=c++20",
            "-O3",
            "-g0",
            "-Wno-psabi",
            "-fno-math-errno",
            "-fno-trapping-math",
        ],
        extra_link_args=["-pthread"],
        # Without a compiler PyTorch serves, and says what that costs.
        optional=True,
    )


# An instruction set's kernels are one file, and take up to a minute: setuptools compiles one after the other.
with ParallelCompile():
    setup(ext_modules=[extension(name, folder) for name, folder in MODULES.items()])
