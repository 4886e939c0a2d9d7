"""Chooses the engine that runs a request: by the prompt's beginning, and by load.

Called by ``dispatch``; pure, and fast enough for the event loop (``benchmarks/engines/routing.py``). Prompts
that begin with the same block of tokens prefer the same engine, which every gateway finds by itself:
rendezvous hashing of the beginning and the worker's id. When an engine leaves, only its own prompts prefer
another.

The preference costs at most a bounded imbalance, since it is worth little where any engine finds a prefix on
the shards. With ``--placement local`` a prefix lies in the engine that computed it, and the preference saves
its prefill. Must not know health, clients or the directory.
"""

from collections.abc import Callable, Container, Sequence
from typing import Generic, Protocol, TypeVar

from farshore.errors import TransportError
from farshore.gateway.requests.validate import Job

SLACK = 1
"""Requests that a preferred engine may have more than the least loaded one, when that has few."""
SLACK_SHARE = 0.25
"""The same as a share of the least loaded engine's requests, when that has many."""

_MASK = (1 << 64) - 1


class Candidate(Protocol):
    """An engine that takes requests."""

    worker: str
    seed: int
    """64 bits of a hash of the worker's id."""
    sent: int
    """Requests that this gateway has sent there, ended ones too."""

    @property
    def load(self) -> int:
        """Requests that run or wait there."""


_Engine = TypeVar("_Engine", bound=Candidate)


class Router(Generic[_Engine]):
    """``available``: returns the engines that take requests. ``problem``: returns why there are none."""

    def __init__(self, available: Callable[[], Sequence[_Engine]], problem: Callable[[], str | None]) -> None:
        self._available = available
        self._problem = problem

    def choose(self, job: Job, excluding: Container[str] = ()) -> _Engine:
        """An available engine whose worker is not in ``excluding``. Raises TransportError if there is
        none."""
        candidates = [engine for engine in self._available() if engine.worker not in excluding]
        if not candidates:
            raise TransportError(f"{self._problem() or 'no other dense worker takes requests'}; try again")
        return preferred(job.prefix_key, candidates)


def preferred(prefix_key: int | None, candidates: Sequence[_Engine]) -> _Engine:
    """The engine with the highest score for ``prefix_key`` among those whose load is at most ``load_limit``
    of the least loaded; without a key the least loaded, and among equals the one that was sent least."""
    if prefix_key is None:
        return min(candidates, key=lambda engine: (engine.load, engine.sent))
    loads = [engine.load for engine in candidates]
    limit = load_limit(min(loads))
    best, best_score = candidates[0], -1
    for engine, load in zip(candidates, loads, strict=True):
        if load <= limit:
            score = _mixed(prefix_key ^ engine.seed)
            if score > best_score:
                best, best_score = engine, score
    return best


def load_limit(least: int) -> float:
    """The load up to which an engine is preferred, if the least loaded one has ``least`` requests."""
    return least + max(SLACK, least * SLACK_SHARE)


def _mixed(value: int) -> int:
    """64 bits that depend on all bits of ``value``, after Steele and others' SplitMix. hashlib would take ten
    times as long."""
    value = value * 0x9E3779B97F4A7C15 & _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
