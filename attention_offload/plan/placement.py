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
    """The emptiest first; of equally empty ones the smaller id."""


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
    """Cut positions ``0 .. tokens`` of every class into shares, in position order; raises Full.

    Cuts fall on block boundaries, so that a span holds whole blocks but for the sequence's last one: only
    whole blocks can be named and shared. A share is a block or more, unless ``tokens`` is less: every further
    worker costs a block and a hop, so a short sequence goes to few of them, the emptiest. Blocks are divided
    evenly among those; one without room for its even part takes what it can, and further workers take part
    only where the room of the first is not enough.
    """
    blocks = -(-tokens // BLOCK_TOKENS)
    shares = []
    for head_class in classes:
        held = head_class.group1 - head_class.group0
        limits = [room.tokens * groups // held // BLOCK_TOKENS for room in head_class.workers]
        if sum(limits) < blocks:
            raise Full(
                f"a sequence of {tokens} tokens does not fit: its shards have room for"
                f" {sum(limits) * BLOCK_TOKENS}",
                free_bytes=0,
            )
        first = 0
        for worker, count in _even_parts(blocks, limits, most_parts=max(1, tokens // BLOCK_TOKENS)):
            last = min(first + count * BLOCK_TOKENS, tokens)
            shares.append(
                Share(head_class.workers[worker].worker, first, last, head_class.group0, head_class.group1)
            )
            first = last
    return shares


def _cuts(total: int, parts: int) -> list[int]:
    return [total * i // parts for i in range(parts + 1)]


def _even_parts(blocks: int, limits: Sequence[int], *, most_parts: int) -> list[tuple[int, int]]:
    """(index, blocks) for as many of ``limits`` as take any, at most ``most_parts`` unless those are too
    small together. ``limits`` descend, and are enough in all.

    The largest limit comes last, with what does not divide evenly: the last part is the one whose last block
    may be almost empty.
    """
    parts = min(most_parts, len(limits))
    while sum(limits[:parts]) < blocks:
        parts += 1
    found = []
    for index in reversed(range(parts)):
        # The smallest first: what it cannot take is divided among the others.
        count = min(limits[index], blocks // (index + 1))
        blocks -= count
        if count:
            found.append((index, count))
    return found
