"""An engine and a shard that may be on one host: whether they have cores of their own.

Asked when they connect. Where they share cores, one of them computes at a time: the engine does its own part
first, then hands its cores over, and the shard gives them back as soon as it has answered.
"""

import os
from collections.abc import Collection

import torch

from farshore.attention_offload.transport.frames import native
from farshore.kernels.select import implementation


def usable_cores() -> list[int]:
    """Where this process's threads may run."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def too_few_with(cores: Collection[int], threads: int) -> bool:
    """Whether this process's threads, and ``threads`` of another that may run on ``cores`` of this host, are
    more than the cores of both, some of which are the same."""
    own = set(usable_cores())
    return not own.isdisjoint(cores) and torch.get_num_threads() + threads > len(own.union(cores))


def share_cores() -> None:
    """For the process of an attention worker, before it starts threads: they run at once when they wake, and
    give their cores up as soon as they have nothing to do."""
    if _computes_natively():
        native().share_cores()


def give_way() -> None:
    """For the process of an engine that shares cores with a shard: the shard's threads run as soon as they
    wake, even where one of the engine's waits awake."""
    if _computes_natively():
        native().give_way()


def _computes_natively() -> bool:
    return native() is not None and implementation(torch.device("cpu"), torch.float32).native
