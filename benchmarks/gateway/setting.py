"""The sizes of the gateway benchmark, and what its parts share.

Made by ``gateway.benchmark``. Must not know the bars.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. The defaults are those of the bars; tests use smaller sizes."""

    streams: int = 200
    tokens_per_s: float = 5.0
    """The rate of each stream."""
    window_s: float = 8.0
    """How long CPU time and delays are measured in each round, while all streams run."""
    rounds: int = 3
    """Each runs the gateway and the empty server, alternately."""
    masks: int = 2_000
    """Tokens whose masks are timed, of each kind of structure."""

    @property
    def tokens(self) -> int:
        """Tokens of each stream: those of the window, and of two seconds before and after it."""
        return round(self.tokens_per_s * (self.window_s + 4.0))


@dataclass(frozen=True, slots=True)
class Setting:
    """One run of the benchmark. ``progress`` receives messages for the user."""

    sizes: Sizes
    progress: Callable[[str], None]
