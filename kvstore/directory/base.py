"""The directory's interface: which workers there are, where they listen, and until when that is known.

Called by workers, which keep their lease, and by engines, gateways and the controller, which look workers up;
never on the token path. All of it is soft state: it may be lost at any time, and workers announce themselves
again. A lease is for discovery only: a worker whose lease ran out gets no new work, and nothing else follows
(invariant 3, docs/architecture.md). It must not know stores or transports.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, Protocol

from farshore.ids import WorkerId

WorkerKind = Literal["dense", "attention"]
WorkerState = Literal["loading", "serving", "failed"]

LEASE_S = 2.0
"""For how long a worker is listed after it was heard of."""
RENEW_S = 0.5
"""Time between two renewals of a lease."""
SETTLE_S = 3 * LEASE_S
"""How long a directory that started again, or was paused, reports that its list is not settled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    """What a worker announces of itself."""

    worker: WorkerId
    """Its incarnation: another process has another id."""
    kind: WorkerKind
    slot: str
    """The name of its place in the cluster, such as ``attention-3``."""
    address: str
    """HOST:PORT of its gRPC service; empty while it loads."""
    host: str
    """The address of its node."""
    process_id: int
    state: WorkerState
    progress: str = ""
    """How far it has loaded its model, in a few words."""
    shards: int = 0
    """Attention workers that answer it, if it is a dense worker."""
    failure: str = ""
    """Why it failed to start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The workers with a valid lease, by slot."""

    workers: tuple[WorkerRecord, ...]
    closed: frozenset[WorkerId]
    """Workers on which nothing new is to be placed."""
    settled: bool
    """Whether a worker that is missing from the list has really been silent. False for SETTLE_S after the
    directory started again or was paused."""


class Directory(Protocol):
    """Thread-safe. Every call ends within a deadline of a second or so. A remote directory raises
    TransportError if it does not answer."""

    def renew(self, record: WorkerRecord) -> None:
        """Lists the worker for LEASE_S from now, with this record. Idempotent."""

    def withdraw(self, worker: WorkerId) -> None:
        """Removes a worker that ends. Idempotent."""

    def close(self, workers: Collection[WorkerId]) -> None:
        """Makes these, and no others, the closed workers. Idempotent."""

    def listing(self) -> Listing:
        """The workers that are known now."""
