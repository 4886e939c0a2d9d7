"""Builds the native CPU kernels where there is a compiler; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("kernels/cpu/native")

setup(
    ext_modules=[
        Extension(
            "farshore.kernels.cpu._native",
            sources=sorted(str(path) for path in SOURCES.glob("*.cpp")),
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
            # Each isa_*.cpp names its own instruction set; the choice is made when the module is imported.
            extra_compile_args=[
                "-std=c++20",
                "-O3",
                "-g0",
                "-Wno-psabi",
                "-fno-math-errno",
                "-fno-trapping-math",
            ],
            extra_link_args=["-pthread"],
            # Without a compiler the reference kernels serve, and say what that costs.
            optional=True,
        )
    ]
)
