"""Decides which shards hold a new sequence's spans: by token range, by head group, or by both.

Called by the engine's KV cache (``workers.engine.kv.cache``). The functions are pure: they depend only on the
free memory that the shards reported. Which shards an engine may use is the controller's decision, which this
module must not know.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from farshore.errors import Full
from farshore.ids import WorkerId
from farshore.kernels.base import BLOCK_TOKENS

ShardBy = Literal["range", "head", "both"]


class FreeTokens(NamedTuple):
    """The free memory of one shard, in tokens. A token counts with all head groups of the model."""

    worker: WorkerId
    tokens: int


class Share(NamedTuple):
    """A future span at one worker: positions ``first .. last``, head groups ``group0 .. group1``, ends not
    included."""

    worker: WorkerId
    first: int
    last: int
    group0: int
    group1: int


class GroupPlacement(NamedTuple):
    """A range of head groups, and the shards among which the sequence's tokens are divided for it."""

    group0: int
    group1: int
    workers: tuple[FreeTokens, ...]
    """The shards, in descending order of free tokens; equal ones in ascending order of id."""


def place_groups(free: Sequence[FreeTokens], *, groups: int, shard_by: ShardBy) -> list[GroupPlacement]:
    """Divides the model's ``groups`` head groups into ranges, and the workers among the ranges.

    ``range``: one range of all groups. ``head``: as many ranges as there are groups or workers, whichever is
    less, with one worker each; further workers hold nothing of this sequence. ``both``: ranges with about two
    workers each. Each range gets workers from the emptiest to the fullest. Raises Full if there is no worker.
    """
    workers = sorted(free, key=lambda shard: (-shard.tokens, shard.worker))
    if not workers:
        raise Full("there is no attention worker to hold the sequence", free_bytes=0)
    count = {
        "range": 1,
        "head": min(groups, len(workers)),
        "both": min(groups, (len(workers) + 1) // 2),
    }[shard_by]
    if shard_by == "head":
        workers = workers[:count]
    cuts = [groups * i // count for i in range(count + 1)]
    return [GroupPlacement(cuts[i], cuts[i + 1], tuple(workers[i::count])) for i in range(count)]


def spread(placements: Sequence[GroupPlacement], *, tokens: int, groups: int) -> list[Share]:
    """Divides positions ``0 .. tokens`` of every placement into shares, in position order. Raises Full if the
    workers of a placement do not have enough free memory. ``groups`` is the model's number of head groups.

    Cuts lie on block boundaries, so that only the sequence's last block may be partly filled: only whole
    blocks can be named and shared. A share has at least one block, unless ``tokens`` is less than that: each
    further worker costs a block and a hop, so a short sequence goes to few workers, the emptiest ones. The
    blocks are divided evenly among these; a worker with less free memory than its even number takes what it
    can. Further workers are used only if the emptiest ones are too small.
    """
    blocks = -(-tokens // BLOCK_TOKENS)
    shares = []
    for placement in placements:
        placed_groups = placement.group1 - placement.group0
        limits = [shard.tokens * groups // placed_groups // BLOCK_TOKENS for shard in placement.workers]
        if sum(limits) < blocks:
            raise Full(
                f"a sequence of {tokens} tokens does not fit: its shards have room for"
                f" {sum(limits) * BLOCK_TOKENS}",
                free_bytes=0,
            )
        first = 0
        for index, count in _even_counts(blocks, limits, most_shares=max(1, tokens // BLOCK_TOKENS)):
            last = min(first + count * BLOCK_TOKENS, tokens)
            worker = placement.workers[index].worker
            shares.append(Share(worker, first, last, placement.group0, placement.group1))
            first = last
    return shares


def _even_counts(blocks: int, limits: Sequence[int], *, most_shares: int) -> list[tuple[int, int]]:
    """Divides ``blocks`` among the workers with the first ``limits``. Returns (index into ``limits``, number
    of blocks) for each worker that takes any.

    At most ``most_shares`` workers take blocks, or as many as are needed if these are too small together.
    ``limits`` must be in descending order, and their sum at least ``blocks``. The worker with the largest
    limit comes last and takes the remainder of an uneven division: the last block of the last share may be
    almost empty.
    """
    used = min(most_shares, len(limits))
    while sum(limits[:used]) < blocks:
        used += 1
    counts = []
    for index in reversed(range(used)):
        # From the smallest limit up: blocks that a worker cannot take are divided among the larger ones.
        count = min(limits[index], blocks // (index + 1))
        blocks -= count
        if count:
            counts.append((index, count))
    return counts
