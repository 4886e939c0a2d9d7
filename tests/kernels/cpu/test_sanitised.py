"""The native kernels under sanitisers: no access outside their memory, no undefined behaviour, no race."""

from pathlib import Path

import pytest

KERNEL_TESTS = Path(__file__).parents[1]
SOURCES = KERNEL_TESTS.parents[1] / "kernels" / "cpu" / "native"
SUITE = [
    "test_extend.py",
    "test_partial.py",
    "test_packed.py",
    "cpu/test_threads.py",
    "test_merge.py",
    "cpu/test_arguments.py",
]
"""In this order two processes that take them in turn have about as much to do."""

RACES = """
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>
#include "runtime/pool.h"

// Callers that compete for the pool, tasks of changing size, offers, plain writes that the pool alone orders.
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
                int offered = 0;
                farshore::start_async([](void* it, int) { ++*static_cast<int*>(it); }, &offered);
                farshore::wait_async();
                for (int it : done)
                    if (it != 1 || offered != 1) std::abort();
            }
        });
    for (std::thread& it : callers) it.join();
    std::puts("done");
    std::fflush(stdout);
    std::_Exit(0);
}
"""

pytestmark = pytest.mark.heavy


def test_memory_and_undefined_behaviour(sanitiser):
    """Runs SUITE with every instruction set, and with guards around the memory that PyTorch allocates."""
    tests = [KERNEL_TESTS / name for name in SUITE]
    sanitiser.run_suite(
        "farshore.kernels.cpu._native", SOURCES, tests, "--hypothesis-profile=few", "-k", "not reference"
    )


def test_the_pool_has_no_races(sanitiser, tmp_path):
    (tmp_path / "races.cpp").write_text(RACES)
    sanitiser.run_program(
        [tmp_path / "races.cpp", SOURCES / "runtime" / "pool.cpp"], "thread", include=SOURCES
    )
