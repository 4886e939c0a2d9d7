"""Where the spans of a new sequence go: by token range, by head group, or by both.

A pure rule over what the shards say is free. Which shards an engine may use is the controller's business.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from farshore.errors import Full
from farshore.ids import WorkerId
from farshore.kernels.base import BLOCK_TOKENS

ShardBy = Literal["range", "head", "both"]


class Room(NamedTuple):
    """What a shard has free. ``tokens`` counts tokens with every head group of the model."""

    worker: WorkerId
    tokens: int


class Share(NamedTuple):
    """Positions ``first .. last``, head groups ``group0 .. group1``: one worker's future span."""

    worker: WorkerId
    first: int
    last: int
    group0: int
    group1: int


class HeadClass(NamedTuple):
    """A range of head groups, and the shards that split the sequence's tokens among them."""

    group0: int
    group1: int
    workers: tuple[Room, ...]


def head_classes(rooms: Sequence[Room], *, groups: int, shard_by: ShardBy) -> list[HeadClass]:
    """Divide workers and head groups into classes, the emptiest workers first.

    ``range``: one class of all groups. ``head``: as many classes as groups or workers allow, one worker each
    (a worker beyond that holds nothing of this sequence). ``both``: classes of about two workers.
    """
    workers = sorted(rooms, key=lambda room: (-room.tokens, room.worker))
    if not workers:
        raise Full("no attention worker is there to hold the sequence", free_bytes=0)
    count = {
        "range": 1,
        "head": min(groups, len(workers)),
        "both": min(groups, (len(workers) + 1) // 2),
    }[shard_by]
    if shard_by == "head":
        workers = workers[:count]
    group_cuts = _cuts(groups, count)
    return [HeadClass(group_cuts[i], group_cuts[i + 1], tuple(workers[i::count])) for i in range(count)]


def spread(classes: Sequence[HeadClass], *, tokens: int, groups: int) -> list[Share]:
    """Spread positions ``0 .. tokens`` evenly over every class's workers, however few they are.

    Cuts fall on block boundaries where the sequence is long enough for it. A worker without room for its
    even part takes what it can and the others share the rest; raises Full where that does not work out.
    """
    shares = []
    for head_class in classes:
        held = head_class.group1 - head_class.group0
        limits = [room.tokens * groups // held // BLOCK_TOKENS * BLOCK_TOKENS for room in head_class.workers]
        cuts = _even_cuts(tokens, limits)
        if cuts is None:
            raise Full(
                f"a sequence of {tokens} tokens does not fit: its shards have room for {sum(limits)}",
                free_bytes=0,
            )
        for room, first, last in zip(head_class.workers, cuts, cuts[1:], strict=False):
            if first < last:
                shares.append(Share(room.worker, first, last, head_class.group0, head_class.group1))
    return shares


def _cuts(total: int, parts: int) -> list[int]:
    return [total * i // parts for i in range(parts + 1)]


def _even_cuts(tokens: int, limits: list[int]) -> list[int] | None:
    """Cut points of an even split under per-part limits, or None. Limits are whole blocks."""
    align = BLOCK_TOKENS if tokens >= BLOCK_TOKENS * len(limits) else 1
    cuts = [0]
    for index in range(len(limits)):
        left, parts = tokens - cuts[-1], len(limits) - index
        after = sum(limits[index + 1 :])
        take = -(-left // parts)
        if parts > 1:
            take = -(-take // align) * align
        take = min(max(take, left - after), left)
        if take > limits[index]:
            take = limits[index]
        cuts.append(cuts[-1] + take)
    return cuts if cuts[-1] == tokens else None
