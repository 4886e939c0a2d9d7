"""Determines whether an engine and a shard on one host compete for cores, and sets their threads up for that.

Called when a connection is opened, and by the process of an attention worker at its start. If the two share
cores, only one of them computes at a time: the engine computes its own share of a layer's attention first,
then waits, so that the shard has the cores until it has answered.
"""

import os
from collections.abc import Collection

import torch

from farshore.attention_offload.transport.frames import native
from farshore.kernels.host import HOST
from farshore.kernels.select import implementation


def usable_cores() -> list[int]:
    """The numbers of the cores on which this process's threads may run, ascending."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def oversubscribed_with(cores: Collection[int], threads: int) -> bool:
    """Whether this process and another process on this host have more threads than cores.

    ``cores`` and ``threads`` are the other process's usable cores and its number of computing threads.
    Returns False if the two processes have no core in common."""
    local_cores = set(usable_cores())
    if local_cores.isdisjoint(cores):
        return False
    return torch.get_num_threads() + threads > len(local_cores.union(cores))


def share_cores() -> None:
    """Sets up an attention worker's process for sharing its cores with an engine.

    Must be called before the process starts threads, which inherit the setting. The calling thread and the
    threads that it starts get a short scheduler time slice (Linux 6.12 and later), so that they run as soon
    as they wake. The kernels' threads sleep instead of spinning when they are idle."""
    if _computes_natively():
        native().share_cores()


def lower_pool_priority() -> None:
    """Lowers the scheduling priority of the kernels' threads in an engine that shares cores with a shard.

    A shard's thread that wakes on the core of a spinning kernel thread then runs at once. The calling thread
    keeps its priority. The change lasts until the process ends: raising a priority needs privileges."""
    if _computes_natively():
        native().give_way()


def _computes_natively() -> bool:
    return native() is not None and implementation(HOST, dtype=torch.float32).native
