from dataclasses import replace

import pytest

from farshore.benchmarks.machine import (
    MachineSizes,
    available_bytes,
    cold_bytes,
    facts,
    l3_bytes,
    measure,
    physical_cores,
)


def test_facts_of_this_machine():
    here = facts(threads=3)
    assert here.threads == 3
    assert here.cpu and here.physical_cores >= 1
    assert 0 < available_bytes(here) <= here.memory_bytes


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("32K", 32 << 10), ("491520K", 480 << 20), ("36M", 36 << 20)]
)
def test_l3(tmp_path, text, size_bytes):
    for index, (level, size) in enumerate([("1", "48K"), ("1", "32K"), ("2", "2048K"), ("3", text)]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "level").write_text(f"{level}\n")
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert l3_bytes(tmp_path) == size_bytes


def test_no_l3(tmp_path):
    assert l3_bytes(tmp_path) is None


def test_threads_of_a_core_count_once(tmp_path):
    for cpu, (package, core) in enumerate([(0, 0), (0, 0), (0, 1), (1, 0)]):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{package}\n")
        (topology / "core_id").write_text(f"{core}\n")
    (tmp_path / "cpufreq").mkdir()
    assert physical_cores(tmp_path) == 3


@pytest.mark.parametrize(
    ("l3", "memory", "expected"),
    [
        (32 << 20, 64 << 30, 256 << 20),
        (1 << 30, 64 << 30, 4 << 30),
        (480 << 20, 3 << 30, 1 << 30),
        (None, 64 << 30, 2 << 30),
    ],
)
def test_what_is_read_exceeds_the_caches_and_leaves_memory(machine, l3, memory, expected):
    assert cold_bytes(replace(machine, l3_bytes=l3, memory_bytes=memory)) == expected


def test_measured_rates(machine):
    steps = []
    rates = measure(
        machine, MachineSizes(buffer_bytes=8192, gemm=(8, 16), least_run_s=0, rounds=3), progress=steps.append
    )
    assert (
        rates.read_gbps == rates.read_gbps_by_reader[rates.reader] == max(rates.read_gbps_by_reader.values())
    )
    assert rates.read_buffer_bytes == 8192 and rates.read_buffer_of_l3 == 2
    assert rates.copy_gbps > 0
    assert set(rates.gemm_gflops_by_size) == {"bfloat16 8", "bfloat16 16", "float32 8", "float32 16"}
    for dtype in ("bfloat16", "float32"):
        assert rates.gemm_gflops[dtype] == max(rates.gemm_gflops_by_size[f"{dtype} {n}"] for n in (8, 16))
    assert rates.gemm_gflops_by_size[rates.gemm] == max(rates.gemm_gflops.values())
    assert steps


def test_products_that_would_take_too_long_are_left_out(machine):
    sizes = MachineSizes(buffer_bytes=8192, gemm=(8, 16), gemm_run_s=0.0, least_run_s=0, rounds=3)
    assert set(measure(machine, sizes, progress=lambda _: None).gemm_gflops_by_size) == {
        "bfloat16 8",
        "float32 8",
    }
