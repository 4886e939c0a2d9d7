"""Chooses what a device needs: its kernels for a dtype, the fastest that are installed, and its runtime.

Called by shards, the engine, models and the choice of transports. An implementation is imported when it is
first asked for: the GPU's needs triton, the native one a C++ compiler at installation.
"""

import logging
import os
from functools import cache
from importlib import import_module
from typing import Any, cast

import torch

from farshore.kernels import reference
from farshore.kernels.base import Kernels
from farshore.kernels.dense import reference as dense_reference
from farshore.kernels.dense.base import DenseKernels
from farshore.kernels.runtime.base import DeviceRuntime
from farshore.kernels.runtime.cuda import CudaRuntime
from farshore.kernels.runtime.immediate import ImmediateRuntime

_LOG = logging.getLogger(__name__)

CPU_KERNELS = "FARSHORE_TEST_CPU_KERNELS"
"""The environment variable that lets tests run the GPU's kernels without a GPU."""


def implementation(*devices: torch.device, dtype: torch.dtype) -> Kernels[Any]:
    """The kernels for q in ``dtype`` and KV on ``devices``: a shard's store, or an engine's model and its
    arena. Only the reference computes in float64.

    Returns the reference for a CPU without native kernels, and logs that once. Raises ValueError for devices
    that differ, since no kernel reads two.
    """
    if len(set(devices)) != 1:
        raise ValueError(
            f"KV and model lie on {', '.join(map(str, devices))}: give the arena the model's device"
        )
    (device,) = set(devices)
    if dtype != torch.float64:
        if device.type == "cuda" or (device.type == "cpu" and _triton_on_cpu()):
            return cast(Kernels[Any], import_module("farshore.kernels.gpu.ops"))
        if device.type == "cpu":
            return _for_cpu()
    return reference


def dense(device: torch.device, *, dtype: torch.dtype) -> DenseKernels:
    """The dense kernels for a model of ``dtype`` on ``device``. Those of the CPU, and for float64, are in
    PyTorch."""
    on_gpu = device.type == "cuda" or (device.type == "cpu" and _triton_on_cpu())
    if on_gpu and dtype != torch.float64:
        return cast(DenseKernels, import_module("farshore.kernels.gpu.dense.ops"))
    return dense_reference


def device_runtime(device: torch.device) -> DeviceRuntime:
    """A new runtime for work on ``device``: one that does all work at once for the CPU. Raises RuntimeError
    for a CUDA device that PyTorch does not find."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return CudaRuntime(torch.device("cuda", index))
    return ImmediateRuntime(device)


def _triton_on_cpu() -> bool:
    """Whether tests run the GPU's kernels on CPU memory, in triton's interpreter (``TRITON_INTERPRET=1``)."""
    value = os.environ.get(CPU_KERNELS, "native")
    if value not in ("native", "triton"):
        raise ValueError(f"{CPU_KERNELS}={value}: give native or triton, or unset it")
    return value == "triton"


@cache
def _for_cpu() -> Kernels[Any]:
    try:
        return cast(Kernels[Any], import_module("farshore.kernels.cpu.attention"))
    except ImportError as error:
        _LOG.warning(
            "the native kernels are not built (%s): PyTorch serves, and attention in bfloat16 decode takes"
            " 10 to 30 times as long. Install g++, then farshore again, by pip's --force-reinstall --no-deps",
            error,
        )
        return reference
