"""The things that the parts of this benchmark share: the machine, the sizes, and the report of progress.

Made by ``benchmark`` of this folder. It must not know the parts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from farshore.benchmarks.machine import Facts
from farshore.model_spec import ModelSpec


def _demo() -> ModelSpec:
    """The demo model with twice its positions: a prefix of 8K leaves room for a question. Times do not depend
    on the scaling."""
    return ModelSpec(rope_scaling={"rope_type": "linear", "factor": 2.0})


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. The defaults are what the bars are set for; tests use tiny sizes."""

    spec: ModelSpec = field(default_factory=_demo)
    vocab: int = 32_000
    """Prompts are of token ids below this."""
    rounds: int = 3
    pair_sequences: int = 16
    """Sequences of each engine, in part ``pairs``."""
    pair_prompt_tokens: int = 272
    """A block in a shard, and a tail."""
    pair_tokens: int = 256
    """Tokens of each answer."""
    prefix_tokens: int = 8192
    """A multiple of a block."""
    fairness_frames: int = 2000
    fairness_tokens: int = 64
    """Tokens of each answer after a long prompt, in part ``fairness``."""


@dataclass(frozen=True, slots=True)
class Setting:
    facts: Facts
    sizes: Sizes
    progress: Callable[[str], None]
