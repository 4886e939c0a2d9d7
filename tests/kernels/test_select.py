"""Which kernels ``select`` returns, and its warning if the native ones are not built."""

import logging
import sys

import pytest
import torch

from farshore.kernels import reference, select

CPU = torch.device("cpu")


@pytest.fixture
def afresh():
    """Before and after the test, the choice for CPUs has not been made yet."""
    select._for_cpu.cache_clear()
    yield
    select._for_cpu.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_native_kernels_serve_the_cpu(dtype):
    cpu = pytest.importorskip(
        "farshore.kernels.cpu.attention", reason="the native kernels are not built here"
    )
    assert select.implementation(CPU, dtype=dtype) is cpu


def test_float64_and_other_devices_are_the_references():
    for device in ("cpu", "cuda", "meta"):
        assert select.implementation(torch.device(device), dtype=torch.float64) is reference
    assert select.implementation(torch.device("meta"), dtype=torch.float32) is reference


def test_a_gpu_gets_its_own(monkeypatch):
    ops = object()
    monkeypatch.setitem(sys.modules, "farshore.kernels.gpu.ops", ops)
    assert select.implementation(torch.device("cuda"), dtype=torch.bfloat16) is ops


def test_without_native_kernels_the_reference_serves_and_says_so_once(afresh, monkeypatch, caplog):
    # None in sys.modules makes an import raise ImportError.
    monkeypatch.setitem(sys.modules, "farshore.kernels.cpu.attention", None)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert select.implementation(CPU, dtype=torch.float32) is reference
    (warning,) = caplog.records
    assert "10 to 30 times as long" in warning.getMessage() and "Install g++" in warning.getMessage()


def test_implementations_keep_the_protocol(assert_protocol):
    cpu = pytest.importorskip(
        "farshore.kernels.cpu.attention", reason="the native kernels are not built here"
    )
    for module, native in ((reference, False), (cpu, True)):
        assert_protocol(module, native=native)


def test_a_model_and_its_kv_lie_on_one_device():
    assert select.implementation(CPU, CPU, dtype=torch.float32) is select.implementation(
        CPU, dtype=torch.float32
    )
    with pytest.raises(ValueError, match="KV and model lie on"):
        select.implementation(CPU, torch.device("cuda", 0), dtype=torch.float32)


def test_tests_may_choose_the_gpus_kernels_for_the_cpu(monkeypatch):
    ops = object()
    monkeypatch.setitem(sys.modules, "farshore.kernels.gpu.ops", ops)
    monkeypatch.setenv(select.CPU_KERNELS, "triton")
    assert select.implementation(CPU, dtype=torch.float32) is ops
    assert select.implementation(CPU, dtype=torch.float64) is reference
    monkeypatch.setenv(select.CPU_KERNELS, "cuda")
    with pytest.raises(ValueError, match=r"FARSHORE_TEST_CPU_KERNELS=cuda: give native or triton"):
        select.implementation(CPU, dtype=torch.float32)
