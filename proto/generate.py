"""Regenerates the committed stubs: ``python -P proto/generate.py``, in an environment with ``TOOLS``.

Stubs refuse a runtime older than the tools that wrote them. So they are written with the oldest tools, whose
versions are the minima in pyproject.toml. Mapping the folder to ``farshore/proto`` makes protoc write imports
under ``farshore.proto``.
"""

import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
TOOLS = "1.80.0"
"""Of grpcio-tools: writes stubs for grpcio 1.80.0 and protobuf 6.31.1."""


def generate(target: Path) -> None:
    """Write every ``*_pb2*`` file into ``target``. Raises RuntimeError where protoc refuses."""
    staging = target / "farshore" / "proto"
    staging.mkdir(parents=True, exist_ok=True)
    status = protoc.main(
        [
            "protoc",
            f"-Ifarshore/proto={HERE}",
            f"-I{files('grpc_tools') / '_proto'}",
            f"--python_out={target}",
            f"--pyi_out={target}",
            f"--grpc_python_out={target}",
            *(f"farshore/proto/{path.name}" for path in sorted(HERE.glob("*.proto"))),
        ]
    )
    if status:
        raise RuntimeError(f"protoc ended with status {status}")
    for path in staging.iterdir():
        path.rename(target / path.name)
    staging.rmdir()
    staging.parent.rmdir()


if __name__ == "__main__":
    installed = version("grpcio-tools")
    if installed != TOOLS:
        sys.exit(f"grpcio-tools {installed}: use {TOOLS}, or raise the minima in pyproject.toml with it")
    generate(HERE)
