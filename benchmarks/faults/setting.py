"""What the parts of the faults benchmark share: how much is sent, and how long anything may take.

Made by ``faults``. Must not know the bars.
"""

from collections.abc import Callable
from dataclasses import dataclass

ISSUE_REQUESTS = 2000
"""The run that the bars are for; a shorter one is held against its share of their counts."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured: by default what the bars say; tests make it small."""

    requests: int = ISSUE_REQUESTS
    concurrency: int = 24
    """Hostile requests at once."""
    bystanders: int = 4
    bystander_tokens: int = 160
    sequences: int = 8
    """Streams beside a frozen shard; half of them shall have spans there."""
    stream_tokens: int = 900
    frames: int = 1000
    """To a shard, before it is frozen."""
    frozen_s: float = 3.0
    prompts: int = 8
    prompt_chars: int = 2_000_000
    refusals: int = 3
    """Times that each oversize request is sent; the slowest counts."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One run of the benchmark."""

    sizes: Sizes
    seed: int
    progress: Callable[[str], None]
