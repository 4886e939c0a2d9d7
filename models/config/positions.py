"""Chooses the served length: the positions that a sequence may have, at most.

Called by ``hf`` and ``gguf``. It must not know files or how sequences are served.
"""

import math

from farshore.errors import ModelError
from farshore.models.config.rope import RopeConfig
from farshore.models.config.rope_parameters import FLAG, ORIGINAL

LENGTH_FLAG = "--max-model-len"
MOST_POSITIONS = 1 << 24
"""Angles are computed in float32, which has no odd numbers above this one."""


def longest_length(rope: RopeConfig, max_positions: int, *, from_flag: bool) -> int:
    """The positions that a model of ``max_positions`` has with this scaling, at most MOST_POSITIONS.

    ``from_flag``: the scaling is the operator's, so that the model's ``max_positions`` do not include it. A
    model's own llama3 or longrope scaling is included in its ``max_positions``.
    """
    if rope.kind in ("linear", "dynamic"):
        scaled = max_positions * rope.factor
    elif rope.kind == "yarn" or (from_flag and rope.kind in ("llama3", "longrope")):
        scaled = rope.original_positions * rope.factor
    else:
        scaled = max_positions
    return min(max(max_positions, int(scaled)), MOST_POSITIONS)


def served_length(
    rope: RopeConfig, max_positions: int, *, window: int | None, asked: int | None, from_flag: bool, name: str
) -> int:
    """``asked``: ``--max-model-len``; None: the longest length, but for kinds dynamic and longrope the
    original one, at which both are exact.

    ``window``: the newest tokens that a layer attends to, as the model's files say; None: all. A window of at
    least the served length never hides a token. Raises ModelError for a shorter one, and for an ``asked``
    length above the longest.
    """
    longest = longest_length(rope, max_positions, from_flag=from_flag)
    if asked is None:
        original = int(min(rope.original_positions, longest))
        length = original if rope.by_length else longest
    elif type(asked) is not int or asked < 1:
        raise ModelError(f"{name}: {LENGTH_FLAG} must be a positive whole number, not {asked!r:.80}")
    elif asked > longest:
        original = int(rope.original_positions) if rope.kind == "yarn" else max_positions
        fix = f'{{"rope_type":"yarn","factor":{math.ceil(asked / original)}.0,"{ORIGINAL}":{original}}}'
        raise ModelError(
            f"{name}: {LENGTH_FLAG} {asked} exceeds the model's {longest} positions; give at most {longest}, "
            f"or scale them: {FLAG} '{fix}'"
        )
    else:
        length = asked
    if window is not None and length > window:
        raise ModelError(
            f"{name}: a sliding window of {window} tokens is unsupported for sequences longer than it; "
            f"serve shorter ones: {LENGTH_FLAG} {window}"
        )
    return length
