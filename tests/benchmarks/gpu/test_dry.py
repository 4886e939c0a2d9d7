"""``farshore bench gpu`` on a machine without a GPU."""

import json
import subprocess
import sys

import pytest
import torch

from farshore.benchmarks.catalogue import BENCHMARKS, Options
from farshore.benchmarks.gpu import sections
from farshore.benchmarks.gpu.dry import children
from farshore.benchmarks.gpu.sections import SECTIONS, measured
from farshore.errors import Internal, InvalidRequest


@pytest.mark.heavy
def test_everything_that_a_cpu_can_check_is_right():
    report = BENCHMARKS["gpu"].run(Options(threads=1, dry=True), lambda _: None)
    bars = {bar.name: bar for bar in report.bars}
    assert {name: bar.note for name, bar in bars.items() if not bar.met} == {}
    assert {f"at tiny sizes, {name}" for name in SECTIONS} <= set(bars)
    assert sum(name.startswith("CUDA fakes, ") for name in bars) >= 10
    assert sum(name.startswith("compiled for cuda:90, ") for name in bars) == len(
        children.PROGRAMS_A_PROCESSOR
    )
    json.dumps(report.as_dict())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_error_names_the_fix():
    with pytest.raises(InvalidRequest, match=r"^no GPU is visible to PyTorch: .* or give --dry [^\n]*$"):
        BENCHMARKS["gpu"].run(Options(), lambda _: None)


def test_an_unknown_section_is_refused():
    with pytest.raises(
        InvalidRequest, match="no section 'x9': choose a part of agreement float32; correctness"
    ):
        BENCHMARKS["gpu"].run(Options(only="x9"), lambda _: None)
    with pytest.raises(InvalidRequest, match="no part 'x9': choose a part of fakes; compilation; sections"):
        BENCHMARKS["gpu"].run(Options(only="x9", dry=True), lambda _: None)


def test_a_section_that_fails_is_a_bar_without_a_value(monkeypatch):
    def broken(setting):
        raise RuntimeError("out of memory\nwith a long story")

    monkeypatch.setattr(sections, "SECTIONS", {"first": broken})
    results, (bar,) = measured("first", setting=None)
    assert results == [] and not bar.met
    assert (bar.name, bar.value, bar.note) == ("first", None, "RuntimeError: out of memory")


def test_a_process_that_fails_is_an_error_of_its_last_line():
    with pytest.raises(Internal, match="kernels cuda:90 64 abacus: ValueError: 'abacus' is not a valid"):
        children.rows("kernels", "cuda:90", "64", "abacus")


def test_faults_of_compiled_kernels_are_named():
    good = {"target": "cuda:80", "kernel": "extend", "spills": 0, "shared": 1024, "wide_loads": True}
    assert children.faults(good) == []
    wrong = good | {"spills": 3, "shared": 1 << 20, "wide_loads": False}
    assert [fault.split()[0] for fault in children.faults(wrong)] == ["3", "1048576", "loads"]
    assert children.faults(good | {"kernel": "merge", "wide_loads": False}) == []


def test_neither_ray_nor_redis_is_needed():
    """Nor the other packages that the GPU machines lack."""
    blocked = ("ray", "redis", "psutil", "gguf", "pydantic", "starlette", "opentelemetry", "yaml")
    script = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({blocked}))\n"
        "import farshore.client.cli.bench, farshore.benchmarks.catalogue\n"
        "import farshore.benchmarks.gpu.benchmark, farshore.workers.attention\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
