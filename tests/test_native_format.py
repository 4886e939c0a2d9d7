"""Native code has the format of ``.clang-format``, so that a change shows nothing but itself."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("attention_offload/native", "kernels/cpu/native", "kvstore/native")


@pytest.mark.parametrize("folder", FOLDERS)
def test_native_files_are_formatted(folder):
    """``clang-format -i`` formats a file. Its versions differ: pyproject.toml names one, a PyPI wheel."""
    wheel = pytest.importorskip("clang_format", reason="needs clang-format, of the extra `test`")
    program = Path(wheel.__file__).parent / "data" / "bin" / "clang-format"
    files = sorted(file for file in (ROOT / folder).rglob("*") if file.suffix in (".h", ".cpp"))
    assert files
    check = [str(program), "--dry-run", "-Werror", *map(str, files)]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
