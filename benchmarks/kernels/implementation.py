"""Finds the implementation of the kernels by name, and binds its number of threads.

Called by ``catalogue``. The kernel and store benchmarks call the result by the signatures of
:class:`farshore.kernels.base.Kernels`, without ``threads``.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch

from farshore.benchmarks.kernels.shapes import Sizes
from farshore.benchmarks.machine import Facts, Rates
from farshore.errors import InvalidRequest

MODULES = {"cpu": "farshore.kernels.cpu.attention", "reference": "farshore.kernels.reference"}
"""The modules of the implementations by name, the fastest first."""


class Implementation(NamedTuple):
    name: str
    instruction_set: str | None
    """The instruction set that native kernels use; None for others."""
    plan: Callable[..., Any]
    partial: Callable[..., None]
    extend: Callable[..., None]
    merge: Callable[..., None]


class Setting(NamedTuple):
    """The arguments of every case."""

    implementation: Implementation
    machine: Facts
    rates: Rates
    sizes: Sizes


def choose(name: str | None, *, threads: int) -> Implementation:
    """The implementation ``name``, or the fastest that is built. Also sets the number of PyTorch's threads.

    Raises InvalidRequest for an implementation that is unknown or not built.
    """
    if name is not None and name not in MODULES:
        raise InvalidRequest(f"no kernels {name!r}: choose from {', '.join(MODULES)}")
    torch.set_num_threads(threads)
    for candidate in MODULES if name is None else (name,):
        try:
            kernels = import_module(MODULES[candidate])
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
