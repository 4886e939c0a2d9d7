"""The directory's interface: which workers there are, where they listen, and which prefixes they hold.

Called by workers, which keep their lease and announce blocks, and by engines, gateways and the controller,
which look them up; never on the token path. All of it is soft state: it may be lost at any time, and workers
announce themselves again. A lease is for discovery only: a worker whose lease ran out gets no new work, and
nothing else follows (invariant 3, docs/architecture.md). It must not know stores or transports.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from farshore.errors import InvalidRequest
from farshore.ids import WorkerId

WorkerKind = Literal["dense", "attention"]
WorkerState = Literal["loading", "serving", "draining", "failed"]
"""``draining``: the worker serves what it has, takes nothing new, and then ends."""

LEASE_S = 2.0
"""For how long a worker is listed after it was heard of."""
RENEW_S = 0.5
"""Time between two renewals of a lease."""
SETTLE_S = 3 * LEASE_S
"""How long a directory that started again, or was paused, reports that its list is not settled."""

NAME_BYTES = 16
"""A directory keeps only the first bytes of a block's name: what it finds is a hint, and the worker compares
the tokens."""
MOST_HASHES = 4096
"""Block names in one look-up: a prompt of a million tokens."""
MOST_BLOCKS = 1 << 17
"""Blocks that a directory remembers of one worker. It ignores those announced beyond."""
MOST_EVENTS = 1000
"""The newest ones, which are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How busy a worker is. Gateways compare these to route, so a value may be a renewal old."""

    running: int = 0
    """Requests that are being computed. Of a dense worker, as the next two."""
    waiting: int = 0
    """Requests that are not admitted yet."""
    parked: int = 0
    """Choices that gave their memory back and wait."""
    free_bytes: int = 0
    """Bytes of its store that it can grant now."""
    budget_bytes: int = 0
    """Bytes that its store may use."""


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
    """Why it failed: it could not start, or can't go on."""
    content: str = ""
    """Digest of the model's weights, if it is a dense worker that has loaded them: equal on every host."""
    load: Load | None = None
    """None until it serves."""
    spec: str = ""
    """The model's options as :class:`~farshore.model_spec.ModelSpec` writes them, if it is a dense worker: a
    gateway on another host reads them here."""
    zone: str = ""
    """The failure domain or rack of its node, as the operator names it; empty if not named."""
    device: str = ""
    """Where it computes, and why there: ``cuda: NVIDIA H200, 139 GiB``, or ``cpu`` if that was asked for."""
    node: str = ""
    """The name of its node, as the operator names it; empty if not named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The workers with a valid lease, by slot."""

    workers: tuple[WorkerRecord, ...]
    closed: frozenset[WorkerId]
    """Workers on which nothing new is to be placed."""
    settled: bool
    """Whether a worker that is missing from the list has really been silent. False for SETTLE_S after the
    directory started again, was paused, or could not be reached."""
    draining: frozenset[WorkerId] = frozenset()
    """The closed workers whose spans or sequences are to go elsewhere now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What changed in a worker's named blocks between two of its numbers. Names are SHA-256 hashes of
    :mod:`farshore.kvstore.prefix`, or their first NAME_BYTES or more."""

    since: int
    """The number of the announcement before; 0: ``added`` is all that the worker holds."""
    until: int
    """The number of this one, at least ``since``. A worker counts its changes, from 1."""
    added: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()


class Directory(Protocol):
    """Thread-safe. Every call ends within a deadline of a second or so. A directory in another process raises
    TransportError if it does not answer. Every call is idempotent."""

    def renew(self, record: WorkerRecord) -> None:
        """Lists the worker for LEASE_S from now, with this record."""

    def withdraw(self, worker: WorkerId) -> None:
        """Removes a worker that ends, and what it announced."""

    def close(self, workers: Collection[WorkerId], *, draining: Collection[WorkerId] = ()) -> None:
        """Makes these and the draining ones, and no others, the closed workers; and ``draining``, and no
        others, the draining ones."""

    def listing(self) -> Listing:
        """The workers that are known now."""

    def announce(self, worker: WorkerId, blocks: Announcement) -> int:
        """Notes which named blocks the worker holds. They are forgotten when its lease runs out.

        Returns the number up to which the directory knows this worker's changes; 0 for a worker without a
        lease. If this is not ``blocks.until``, the directory lost or missed a change: announce everything,
        with ``since=0``. Announce nothing new (``since == until``) now and then to learn of that.
        """

    def find_prefix(self, hashes: Sequence[bytes]) -> list[frozenset[WorkerId]]:
        """For each block name, the workers that announced it: a hint, since blocks come and go. Raises
        InvalidRequest for more than MOST_HASHES names."""

    def disconnect(self) -> None:
        """Closes connections, if it has any."""


class ClusterEvent(NamedTuple):
    """What happened to the cluster. ``kind``: started, joined, lost, replaced, killed or retired."""

    number: int
    """From 1, rising."""
    unix_s: float
    kind: str
    subject: str
    """A worker's id, or its slot before it has one."""
    detail: str


class DurableDirectory(Directory, Protocol):
    """A directory that outlives the controller, which therefore keeps its own state there."""

    def claim(self) -> None:
        """Begins a new cluster, of which no worker runs: its list is settled at once. Waits for the leases of
        an earlier cluster of the same name to run out. Raises InvalidRequest if they do not."""

    def load_state(self) -> dict[str, Any] | None:
        """What was stored last; None if nothing was, or if it was lost."""

    def store_state(self, state: Mapping[str, Any]) -> None:
        """Stores an object of JSON that does not expire. As durable as the directory's own storage is: where
        it was lost, or is older, :meth:`listing` stores it again. If this raises an error, the state before
        counts, and is stored again likewise."""

    def publish(self, events: Sequence[ClusterEvent]) -> None:
        """Adds events, oldest first. Ignores those whose numbers are not above those of all that are kept.
        Where these were lost, :meth:`listing` adds them again."""

    def events(self, since: int = 0) -> list[ClusterEvent]:
        """The kept events with numbers above ``since``, oldest first."""


def block_keys(names: Sequence[bytes]) -> list[bytes]:
    """The first NAME_BYTES of each block name. InvalidRequest for a shorter name."""
    shortest = min(map(len, names), default=NAME_BYTES)
    if shortest < NAME_BYTES:
        raise InvalidRequest(f"a block's name of {shortest} bytes: give {NAME_BYTES} at least")
    return [name[:NAME_BYTES] for name in names]


def look_up_keys(hashes: Sequence[bytes]) -> list[bytes]:
    """As :func:`block_keys`, for a look-up. InvalidRequest for more than MOST_HASHES names."""
    if len(hashes) > MOST_HASHES:
        raise InvalidRequest(f"a look-up of {len(hashes)} blocks: ask for {MOST_HASHES} at most")
    return block_keys(hashes)
