"""The native kernels under sanitisers: no access outside of memory, no undefined behaviour, no race."""

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "kernels" / "cpu" / "native"
# As in setup.py, but quicker to compile.
FLAGS = ["-std=c++20", "-O1", "-g", "-fPIC", "-pthread"]
FLAGS += ["-Wno-psabi", "-fno-math-errno", "-fno-trapping-math"]
SUITE = ["test_partial.py", "test_extend.py", "test_merge.py", "test_cpu.py"]

RUN = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
import pytest

built, *arguments = sys.argv[1:]
spec = spec_from_file_location("farshore.kernels.cpu._native", built)
sys.modules[spec.name] = module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])
# A report goes to the process's standard error, and then the process ends: pytest must not hold it back.
code = pytest.main(["-q", "-x", "-s", "-p", "no:cacheprovider", "--hypothesis-profile=few", *arguments])
from farshore.kernels import cpu
assert cpu._native.__file__ == built
sys.exit(code)
"""

RACES = """
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>
#include "pool.h"

// Callers that compete for the pool, tasks of changing size, plain writes that the pool alone orders.
int main() {
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; caller++)
        callers.emplace_back([caller] {
            for (int round = 0; round < 1000; round++) {
                const int count = 1 + (round * 7 + caller) % 13;
                std::vector<int> done(count, 0);
                farshore::parallel_for(count, 1 + round % 5, [&](int i) {
                    volatile char* own = static_cast<char*>(farshore::scratch(64 + 4096 * (round % 3)));
                    for (int pass = 0; pass < 2000; pass++) own[i] = pass;  // long enough for others to come
                    done[i]++;
                });
                for (int it : done)
                    if (it != 1) std::abort();
            }
        });
    for (std::thread& it : callers) it.join();
    std::puts("done");
    std::fflush(stdout);
    std::_Exit(0);
}
"""

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="preloads a library"),
    pytest.mark.skipif(not shutil.which("g++"), reason="needs g++"),
]


def library(name):
    """The compiler's own library, or a skip."""
    path = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"needs {name}")
    return path


def compile_all(*commands):
    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        for done in compilers.map(lambda c: subprocess.run(c, capture_output=True, text=True), commands):
            assert done.returncode == 0, done.stderr


def test_memory_and_undefined_behaviour(tmp_path):
    """Every instruction set against the textbook, with guards around everything PyTorch allocates."""
    preload = [library("libasan.so"), library("libstdc++.so")]
    flags = [*FLAGS, "-D_GLIBCXX_ASSERTIONS", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    include = f"-I{sysconfig.get_paths()['include']}"
    objects = {source: tmp_path / f"{source.stem}.o" for source in sorted(SOURCES.glob("*.cpp"))}
    compile_all(*(["g++", *flags, include, "-c", str(s), "-o", str(o)] for s, o in objects.items()))
    built = tmp_path / "_native.so"
    compile_all(["g++", *flags, "-shared", *map(str, objects.values()), "-o", str(built)])
    tests = [str(Path(__file__).parent / name) for name in SUITE]
    environment = {"LD_PRELOAD": ":".join(preload), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUN, str(built), "-k", "not reference", *tests],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-10000:]


def test_the_pool_has_no_races(tmp_path):
    library("libtsan.so")
    (tmp_path / "races.cpp").write_text(RACES)
    built = tmp_path / "races"
    sources = [str(tmp_path / "races.cpp"), str(SOURCES / "pool.cpp")]
    compile_all(["g++", *FLAGS, "-fsanitize=thread", f"-I{SOURCES}", *sources, "-o", str(built)])
    done = subprocess.run([str(built)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr[-10000:]
