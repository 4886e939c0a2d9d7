"""Which kernels a caller gets, and what it hears where the fast ones are missing."""

import inspect
import logging
import sys

import pytest
import torch

from farshore.kernels import reference, select

CPU = torch.device("cpu")


@pytest.fixture
def afresh():
    """Nobody has asked yet; forgotten again after the test."""
    select._for_cpu.cache_clear()
    yield
    select._for_cpu.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_native_kernels_serve_the_cpu(dtype):
    cpu = pytest.importorskip("farshore.kernels.cpu", reason="the native kernels are not built here")
    assert select.implementation(CPU, dtype) is cpu


def test_float64_and_other_devices_are_the_references():
    for device in ("cpu", "cuda", "meta"):
        assert select.implementation(torch.device(device), torch.float64) is reference
    assert select.implementation(torch.device("meta"), torch.float32) is reference


def test_a_gpu_gets_its_own(monkeypatch):
    ops = object()
    monkeypatch.setitem(sys.modules, "farshore.kernels.gpu.ops", ops)
    assert select.implementation(torch.device("cuda"), torch.bfloat16) is ops


def test_without_native_kernels_the_reference_serves_and_says_so_once(afresh, monkeypatch, caplog):
    # None in sys.modules is how Python spells "cannot be imported".
    monkeypatch.delitem(sys.modules, "farshore.kernels.cpu", raising=False)
    monkeypatch.setitem(sys.modules, "farshore.kernels.cpu._native", None)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert select.implementation(CPU, torch.float32) is reference
    (warning,) = caplog.records
    assert "10 to 30 times as long" in warning.getMessage() and "Install g++" in warning.getMessage()


def test_every_implementation_has_the_references_signatures():
    cpu = pytest.importorskip("farshore.kernels.cpu", reason="the native kernels are not built here")
    for name in ("plan", "partial", "extend", "merge"):
        parameters = (inspect.signature(getattr(it, name)).parameters.values() for it in (cpu, reference))
        ours, expected = ([(p.name, p.kind, p.default) for p in each] for each in parameters)
        assert ours == expected
