"""Checks the protocol with buf: ``python -P proto/check.py``, in an environment of the extra ``test``.

Run by ``.ci/run``. ``buf lint`` checks every file; ``buf breaking`` compares the public packages with
``BASELINE``, so that a change that breaks clients of the accepted protocol is refused. ``--accept`` makes
the protocol as it is now the baseline. Must not know what the messages mean.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "buf.yaml"
BASELINE = HERE / "baseline.binpb"
"""A FileDescriptorSet of the public packages, without comments."""

PUBLIC = ("admin", "inference")


def describe(target: Path, *names: str, comments: bool, folder: Path = HERE) -> None:
    """Write the FileDescriptorSet of the named files of ``folder`` and of their imports to ``target``. Raises
    RuntimeError where protoc refuses."""
    status = protoc.main(
        [
            "protoc",
            f"-Ifarshore/proto={folder}",
            f"-I{files('grpc_tools') / '_proto'}",
            "--include_imports",
            *(["--include_source_info"] if comments else []),
            f"--descriptor_set_out={target}",
            *(f"farshore/proto/{name}.proto" for name in names),
        ]
    )
    if status:
        raise RuntimeError(f"protoc ended with status {status}")


def lint(folder: Path = HERE) -> str:
    """The complaints of ``buf lint``, one a line; empty: none."""
    with tempfile.TemporaryDirectory() as scratch:
        image = Path(scratch, "image.binpb")
        describe(image, *sorted(path.stem for path in folder.glob("*.proto")), comments=True, folder=folder)
        return _buf("lint", image, scratch=scratch)


def breaking(folder: Path = HERE, *, baseline: Path = BASELINE) -> str:
    """The changes since ``baseline`` that break a client, one a line; empty: none."""
    with tempfile.TemporaryDirectory() as scratch:
        image = Path(scratch, "image.binpb")
        describe(image, *PUBLIC, comments=True, folder=folder)
        return _buf("breaking", image, "--against", baseline, scratch=scratch)


def _buf(verb: str, image: Path, *options: str | Path, scratch: str) -> str:
    """The complaints of buf. Raises RuntimeError if buf is missing or fails."""
    try:
        # Beside the interpreter's other programs, which need not be on PATH.
        program = next(file.locate() for file in metadata.files("buf-bin") or () if file.name == "buf")
    except (metadata.PackageNotFoundError, StopIteration) as error:
        raise RuntimeError("buf is not installed: pip install buf-bin, or the extra `test`") from error
    done = subprocess.run(
        [program, verb, image, *options, "--config", CONFIG],
        capture_output=True,
        text=True,
        env=os.environ | {"XDG_CACHE_HOME": scratch},
        timeout=120,
    )
    if done.returncode not in (0, 100):  # 100: it found something
        raise RuntimeError(f"buf {verb} ended with status {done.returncode}: {done.stderr}")
    return done.stdout


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--accept", action="store_true", help="make the present protocol the baseline")
    if parser.parse_args(arguments).accept:
        describe(BASELINE, *PUBLIC, comments=False)
        return 0
    found = lint() + breaking()
    print(found, end="")
    if found:
        print("buf: mend the above. A break of the public protocol that is meant: see docs/contributing.md")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
