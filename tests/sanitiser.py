"""Builds native modules and programs with the compiler's sanitisers, and runs tests on them.

Loaded by the fixture ``sanitiser`` of ``tests/conftest.py``. Must not know what the tests check.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

# The flags of setup.py with less optimisation, and with lines alone for a debugger, to compile faster.
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-pthread"]
CORES = os.cpu_count() or 1
RUNTIME = Path(__file__).parents[1] / "kernels" / "cpu" / "native"
FLAGS += ["-Wno-psabi", "-fno-math-errno", "-fno-trapping-math"]
# Each access calls the checking function, instead of having its code inline: a third less to compile.
ADDRESS = ["-fsanitize=address,undefined", "--param=asan-instrumentation-with-call-threshold=0"]

RUN = """
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
import pytest

name, built, *arguments = sys.argv[1:]
spec = spec_from_file_location(name, built)
sys.modules[name] = module_from_spec(spec)
spec.loader.exec_module(sys.modules[name])
# -s: a sanitiser writes its report to stderr and ends the process, so pytest must not capture the output.
code = pytest.main(["-q", "-x", "-s", "-p", "no:cacheprovider", *arguments])
assert import_module(name).__file__ == built
sys.exit(code)
"""


class Sanitiser:
    """Builds with g++ in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run_suite(self, module: str, sources: Path, tests: list[Path], *arguments: str) -> None:
        """Builds ``module`` from the .cpp files below ``sources`` with the address and the
        undefined-behaviour sanitiser, and runs ``tests`` on it in new processes, one a core, which take them
        in turn. ``arguments`` are pytest's."""
        preload = [_library("libasan.so"), _library("libstdc++.so")]
        flags = [*FLAGS, *ADDRESS, "-D_GLIBCXX_ASSERTIONS", "-fno-sanitize-recover=all"]
        include = [f"-I{folder}" for folder in (sysconfig.get_paths()["include"], sources, RUNTIME)]
        found = sorted(sources.rglob("*.cpp"))
        objects = {source: self._folder / f"{number}.o" for number, source in enumerate(found)}
        _compile(*(["g++", *flags, *include, "-c", str(s), "-o", str(o)] for s, o in objects.items()))
        built = self._folder / "_native.so"
        _compile(["g++", *flags, "-shared", *map(str, objects.values()), "-o", str(built)])
        environment = {
            "LD_PRELOAD": ":".join(preload),
            "ASAN_OPTIONS": "detect_leaks=0",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-P", "-c", RUN, module, str(built), *arguments]
        # A process for each file of tests would import PyTorch as often.
        shares = [tests[first::CORES] for first in range(min(CORES, len(tests)))]
        _at_once(
            partial(_run, cwd=self._folder, env={**os.environ, **environment}, timeout=600),
            [[*command, *map(str, share)] for share in shares],
        )

    def run_program(self, sources: list[Path], sanitiser: str, *, include: Path) -> None:
        """Builds and runs a program, which must print "done". ``sanitiser``: "thread"."""
        _library({"thread": "libtsan.so"}[sanitiser])
        built = self._folder / "program"
        flags = [*FLAGS, f"-fsanitize={sanitiser}", f"-I{include}"]
        _compile(["g++", *flags, *map(str, sources), "-o", str(built)])
        assert _run([str(built)], timeout=300) == "done\n"


def sanitiser_in(folder: Path) -> Sanitiser:
    """A Sanitiser. Skips the test if this system has no g++ or is not Linux."""
    if not sys.platform.startswith("linux"):
        pytest.skip("preloads a library")
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    return Sanitiser(folder)


def _library(name: str) -> str:
    """The path of the compiler's library. Skips the test if it is missing."""
    path = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"needs {name}")
    return path


def _compile(*commands: list[str]) -> None:
    _at_once(_run, commands)


def _at_once(run: Callable[[list[str]], object], commands: Iterable[list[str]]) -> None:
    """Runs as many commands at once as there are cores."""
    with ThreadPoolExecutor(CORES) as runners:
        list(runners.map(run, commands))


def _run(command: list[str], **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-10000:]
    return done.stdout
