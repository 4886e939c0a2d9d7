"""The implementations of the kernels, found by name, with their thread count bound.

Used by the kernel benchmarks, which call what they get here by one signature: that of ``kernels.reference``.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch

from farshore.benchmarks.kernels.shapes import Sizes
from farshore.benchmarks.machine import Facts, Rates
from farshore.errors import InvalidRequest

FASTEST_FIRST = ("cpu", "reference")


class Implementation(NamedTuple):
    name: str
    instruction_set: str | None
    """Of the native kernels: the one that is in use."""
    plan: Callable[..., Any]
    partial: Callable[..., None]
    extend: Callable[..., None]
    merge: Callable[..., None]


class Setting(NamedTuple):
    """What every case is measured with."""

    implementation: Implementation
    machine: Facts
    rates: Rates
    sizes: Sizes


def choose(name: str | None, *, threads: int) -> Implementation:
    """The implementation ``name``, or the fastest that can be imported here. Sets PyTorch's threads, too.

    InvalidRequest for one that is unknown or not built.
    """
    if name is not None and name not in FASTEST_FIRST:
        raise InvalidRequest(f"no kernels {name!r}: choose from {', '.join(FASTEST_FIRST)}")
    torch.set_num_threads(threads)
    for candidate in FASTEST_FIRST if name is None else (name,):
        try:
            kernels = import_module(f"farshore.kernels.{candidate}")
        except ImportError as error:
            missing = error
            continue
        return Implementation(
            candidate,
            next(iter(getattr(kernels, "instruction_sets", ())), None),
            partial(kernels.plan, threads=threads),
            kernels.partial,
            partial(kernels.extend, threads=threads),
            kernels.merge,
        )
    raise InvalidRequest(f"the {name} kernels are not built here: {missing}") from missing
