"""Which implementation of the kernels a caller gets: the fastest that is here.

Called by shards and the engine, which call what they get by the reference's signatures. No implementation is
imported before it is asked for: the GPU's needs triton, the native ones a compiler at installation.
"""

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, Protocol, cast

import torch

from farshore.kernels import reference

_LOG = logging.getLogger(__name__)


class Kernels(Protocol):
    """What every implementation offers; :mod:`farshore.kernels.reference` says what each function does."""

    plan: Callable[..., Any]
    partial: Callable[..., None]
    offer: Callable[..., None]
    complete: Callable[[], None]
    extend: Callable[..., None]
    merge: Callable[..., None]


def implementation(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The kernels for stored KV on ``device`` with q in ``dtype``; float64 is the reference's alone.

    Without the native kernels the reference serves the CPU, which is logged once.
    """
    if dtype != torch.float64:
        if device.type == "cuda":
            return cast(Kernels, import_module("farshore.kernels.gpu.ops"))
        if device.type == "cpu":
            return _for_cpu()
    return cast(Kernels, reference)


@cache
def _for_cpu() -> Kernels:
    try:
        return cast(Kernels, import_module("farshore.kernels.cpu"))
    except ImportError as error:
        _LOG.warning(
            "the native kernels are not built (%s): PyTorch serves, and attention in bfloat16 decode takes"
            " 10 to 30 times as long. Install g++, then farshore again, by pip's --force-reinstall --no-deps",
            error,
        )
        return cast(Kernels, reference)
