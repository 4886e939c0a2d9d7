"""The interface between an engine and the shards it reads from.

An engine knows :class:`Shards` only. A transport is a :class:`Peer`: one connection to one shard. A hot
frame is a pure read: it may be retried or thrown away, and nothing remote changes.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

from farshore.attention_offload.frames import MOST_DEADLINE_S, Transport
from farshore.attention_offload.plan import ShardStep, StepPlan
from farshore.ids import Epoch, SequenceId, SpanId, WorkerId
from farshore.kernels.base import AttentionSpec, KVLayout, State
from farshore.kvstore.base import ShardStore

if TYPE_CHECKING:
    from farshore.attention_offload.frame_stream import FrameStream


class AttentionModel(NamedTuple):
    """What both ends must agree on before a frame makes sense. One layer class per entry of ``specs``."""

    specs: tuple[AttentionSpec, ...]
    layer_class: tuple[int, ...]
    layouts: tuple[KVLayout, ...]
    """Blocks that hold every group of the class; a span narrows it to its own groups."""

    @property
    def has_windows(self) -> bool:
        """Whether what a layer attends to depends on where its rows stand, and not on the reads alone."""
        return any(spec.window_tokens for spec in self.specs)


class ShardIdentity(NamedTuple):
    """Who answers at the other end."""

    worker: WorkerId
    process_id: int
    host: str
    budget_bytes: int
    free_bytes: int
    attended_bytes: int
    """KV bytes this shard has attended to since it started."""
    incarnation: str
    """Of its store: another one has other spans, whatever its worker's id is."""


class Caller(NamedTuple):
    """Which engine makes a call to a shard, and when it sent the call, on its own monotonic clock."""

    engine: str
    """The engine's incarnation."""
    sent_ns: int


Wanted = Mapping[tuple[SequenceId, Epoch], Collection[SpanId]]
"""All spans that an engine still wants of one shard."""


class ShardBeat(NamedTuple):
    """What a shard answers to the beat of an engine, which renews the lease on the engine's holds."""

    worker: WorkerId
    incarnation: str
    budget_bytes: int
    free_bytes: int
    attended_bytes: int
    must_reconcile: bool
    """The next beat must say all that the engine wants: the shard may hold what the engine gave up."""


class Peer(Protocol):
    """One engine's connection to one shard. Hot calls (``begin``, ``send``, ``wait``,
    ``break_off``) come from the engine's loop alone, and never connect; ``connect``, ``ready`` and
    ``identify`` from any thread.

    Every wait has a deadline. A hot call raises :class:`~farshore.errors.Late` where the deadline ran out or
    there is no connection, another :class:`~farshore.errors.TransportError` where the connection broke, or
    what the shard refuses with. After any of these the connection is closed, and the loop goes on without
    this shard until :meth:`connect` has made a new one.
    """

    store: ShardStore
    """The shard's store, for the cold calls: create, write, seal, read, drop."""

    @property
    def transport(self) -> Transport | None:
        """What carries its hot frames; None while nothing is connected."""

    @property
    def frames(self) -> "FrameStream | None":
        """Its connection for hot frames where that is native: several are served by one call of an
        :class:`~farshore.attention_offload.exchange.Exchange`. None elsewhere."""

    @property
    def bulk_transport(self) -> Transport | None:
        """What carries the store's KV; None while nothing is connected."""

    def identify(self) -> ShardIdentity: ...

    @property
    def ready(self) -> bool:
        """Whether there is a connection for hot frames; the twin's too, where there is a twin."""

    def connect(self) -> Transport:
        """Makes the connections that :attr:`ready` asks for, and leaves live ones alone. Blocks up to a
        deadline of its own. Raises TransportError. The next :meth:`begin` takes what was made."""

    def beat(self, wanted: Wanted | None) -> ShardBeat:
        """Renews what the engine holds at the shard. ``wanted``: everything that it wants to hold there; the
        rest is given back. None: only renew."""

    def begin(
        self, step: ShardStep, *, deadline_s: float = MOST_DEADLINE_S, drain_s: float = MOST_DEADLINE_S
    ) -> None:
        """Announce a step. Answers that are owed, of a step that was dropped, are read first and forgotten,
        within ``drain_s``. ``deadline_s`` bounds each send of the step, this one too."""

    def send(self, layer: int, micro_batch: int, q: Tensor) -> Any:
        """Send q ``[rows, heads, k_dim]`` of the rows and heads that the shard sees of the micro-batch, never
        none; returns a token for :meth:`wait`. Rows may lie apart, as where its heads are a slice of more."""

    def wait(self, sent: Any, *, out: State | None = None, deadline_s: float = MOST_DEADLINE_S) -> State:
        """The shard's state: o ``[rows, heads, v_dim]`` in q's dtype, lse f32 (f64) ``[rows, heads]``.
        Valid until the next wait. In the memory of ``out`` where given: rows may lie apart in it, the heads
        of a row may not."""

    def break_off(self) -> None:
        """Closes the connection for hot frames: it failed, or must not be used any more."""

    def twin(self) -> "Peer":
        """A second connection to the same shard, for a step beside this one's. Always the same; connected
        and closed with this one."""

    def close(self) -> None: ...


class Shards(Protocol):
    """All the shards of one engine. ``begin``, ``send`` and ``wait`` raise Late or Lost, which name the
    shards, or what a shard refused; the step must then be dropped."""

    def begin(self, plan: StepPlan, micro_batches: Sequence[range]) -> None:
        """Announce a step whose rows come in ``micro_batches``, in order and without a gap."""

    def overlaps(self, micro_batch: int) -> bool:
        """Whether a shard works on the micro-batch beside the engine, so that q should go early."""

    def send(self, layer: int, micro_batch: int, q: Tensor) -> None:
        """q ``[rows of the micro-batch, q_heads, k_dim]`` goes to every shard of the plan at once; it must
        stay as it is until :meth:`wait`."""

    def wait(self, layer: int, micro_batch: int) -> Sequence[State]:
        """One state per shard, each over all rows and heads of the micro-batch, in span order. Frames are
        waited for in the order they were sent."""
