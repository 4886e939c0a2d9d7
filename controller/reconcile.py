"""Decides what to start, drain, stop and kill, so that the observed cluster becomes the desired one.

Called by ``loop``, once a round. Pure: it asks nothing and changes nothing. Every action is idempotent, and a
round is computed from what is observed alone, so a controller that crashes anywhere leaves what the next
round mends. It must not know Ray or gRPC.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from farshore.ids import WorkerId

Kind = Literal["dense", "attention"]
KINDS: tuple[Kind, ...] = get_args(Kind)

KILL_GRACE_S = 3.0
"""How long a killed worker may keep its slot before its replacement takes another one: its node does not
answer then."""

HEALTHY_S = 60.0
"""After this time without a death a slot's deaths are forgotten."""

MOST_BACKOFF_S = 60.0


class Slot(NamedTuple):
    """A named place for one worker, such as ``attention-3``: the name of its Ray actor."""

    kind: Kind
    index: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """The process that occupies a slot. ``worker``: its incarnation; None until it has registered."""

    slot: Slot
    worker: WorkerId | None = None
    may_serve: bool = False
    """Whether it may be a worker that an engine reports alive, though it has not registered: its link to the
    directory is cut, and this controller is a new one."""
    leaving: bool = False
    """Whether it is to end though its kind has none too many: an operator drains it, or its process was told
    to end."""
    closed: bool = False
    """Whether engines and gateways were told to place nothing new on it, and to move what they can."""
    readers: int | None = 0
    """Sequences that read from it or run on it; None while that is unknown."""
    overdue: bool = False
    """Whether it has drained for longer than it may."""
    frozen: bool = False
    """Whether it is to be given up: its lease ran out, it answers no probe, no engine reports it alive."""
    killed_s: float | None = None
    """When this controller first killed it."""


class Deaths(NamedTuple):
    """How often a slot's worker died since the slot was last healthy, and when it died last."""

    count: int
    last_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """The cluster as one round found it. Times are of the clock that gives ``now_s``."""

    processes: Mapping[Slot, Process]
    deaths: Mapping[Slot, Deaths] = field(default_factory=dict)
    settled: bool = True
    """False while the directory or this controller has just started or was paused: silence proves nothing
    then, and nothing is started or stopped."""


class Start(NamedTuple):
    """Start a worker in a free slot. Idempotent: a slot has at most one process."""

    slot: Slot


class Drain(NamedTuple):
    """Tell the engines and gateways to place nothing new on this worker, and to move what they can."""

    slot: Slot
    worker: WorkerId


class Open(NamedTuple):
    """Undo Drain."""

    slot: Slot
    worker: WorkerId


class Stop(NamedTuple):
    """End a worker that nothing reads from, or whose time to drain is over."""

    slot: Slot


class Kill(NamedTuple):
    """End a frozen worker by SIGKILL, so that its slot and its resources become free."""

    slot: Slot


Action = Start | Drain | Open | Stop | Kill


def reconcile(desired: Mapping[Kind, int], observed: Observed, now_s: float) -> tuple[Action, ...]:
    """The actions of one round. ``desired``: the number of workers of each kind."""
    if not observed.settled:
        return ()
    actions: list[Action] = []
    for kind in KINDS:
        processes = [process for process in observed.processes.values() if process.slot.kind == kind]
        actions += _of_kind(kind, desired.get(kind, 0), sorted(processes, key=_rank), observed, now_s)
    return tuple(actions)


def backoff_s(deaths: int) -> float:
    """The time between a slot's last death and its next start. The first replacement starts at once."""
    return 0.0 if deaths <= 1 else min(2.0 ** (deaths - 2), MOST_BACKOFF_S)


def _of_kind(
    kind: Kind, count: int, processes: list[Process], observed: Observed, now_s: float
) -> Iterable[Action]:
    given_up = [process for process in processes if process.frozen]
    leaving = [process for process in processes if process.leaving and not process.frozen]
    kept = [process for process in processes if not (process.leaving or process.frozen)]
    yield from (Kill(process.slot) for process in given_up)
    yield from (
        Open(process.slot, process.worker)
        for process in kept[:count]
        if process.closed and process.worker is not None
    )
    yield from _drained([*leaving, *kept[count:]])
    dying = sum(
        not process.leaving and (process.killed_s is None or now_s - process.killed_s < KILL_GRACE_S)
        for process in given_up
    )
    yield from _started(kind, count - len(kept) - dying, processes, observed, now_s)


def _drained(processes: Iterable[Process]) -> Iterable[Action]:
    for process in processes:
        if process.worker is None:
            if not process.may_serve:
                yield Stop(process.slot)
        elif not process.closed:
            yield Drain(process.slot, process.worker)
        elif process.readers == 0 or process.overdue:
            yield Stop(process.slot)


def _started(
    kind: Kind, missing: int, processes: list[Process], observed: Observed, now_s: float
) -> Iterable[Action]:
    """The lowest free slots. A slot in back-off counts as started: another one must not take its turn."""
    occupied = {process.slot.index for process in processes}
    index = 0
    while missing > 0:
        if index not in occupied:
            slot = Slot(kind, index)
            missing -= 1
            deaths = observed.deaths.get(slot)
            if deaths is None or now_s >= deaths.last_s + backoff_s(deaths.count):
                yield Start(slot)
        index += 1


def _rank(process: Process) -> tuple[bool, int]:
    """Those of the lowest rank are kept. A process that has not registered may be frozen: a new controller
    keeps those that serve."""
    return process.worker is None, process.slot.index
