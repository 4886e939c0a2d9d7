"""The sizes and the setting that all parts of the faults benchmark share.

Made by ``faults.benchmark``. Must not know the bars.
"""

from collections.abc import Callable
from dataclasses import dataclass

ISSUE_REQUESTS = 2000
"""The number of hostile requests of a full run; the bars of a shorter run need its share of their counts."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. The defaults are those of the bars; tests use smaller sizes."""

    requests: int = ISSUE_REQUESTS
    concurrency: int = 24
    """Hostile requests at once."""
    bystanders: int = 4
    bystander_tokens: int = 160
    sequences: int = 8
    """Streams that run while a shard is frozen; half of them should have spans in it."""
    stream_tokens: int = 900
    frames: int = 1000
    """Frames that a shard receives before it is frozen."""
    frozen_s: float = 3.0
    prompts: int = 8
    prompt_chars: int = 2_000_000
    refusals: int = 3
    """How often each oversize request is sent; the slowest answer counts."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One run of the benchmark. ``progress`` receives messages for the user."""

    sizes: Sizes
    seed: int
    progress: Callable[[str], None]
