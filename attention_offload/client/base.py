"""Defines the engine's interface to one shard, the same for every transport.

Implemented by ``in_process`` and ``remote``. Called by the fan-out for steps, and by the engine's KV code for
cold calls. It must not know what else the engine reads from.
"""

from typing import Any, Protocol

from torch import Tensor

from farshore.attention_offload.base import Imported, ShardBeat, ShardIdentity, Wanted
from farshore.attention_offload.plan.step_plan import ShardStep
from farshore.attention_offload.transport.frames import MOST_DEADLINE_S, Transport
from farshore.attention_offload.transport.native_connection import NativeConnection
from farshore.ids import SequenceId, SpanId
from farshore.kernels.base import State
from farshore.kvstore.base import ShardStore


class ShardClient(Protocol):
    """One engine's client of one shard.

    Only the engine's loop makes the hot calls: ``begin``, ``send``, ``wait`` and ``break_off``. They never
    connect. ``connect``, ``ready`` and ``identify`` are thread-safe.

    Every wait has a deadline. A hot call raises :class:`~farshore.errors.Late` if its deadline expires or if
    there is no connection, another :class:`~farshore.errors.TransportError` if the connection breaks, and
    otherwise the error with which the shard refuses the call. After any of these errors the connection is
    closed, and the shard cannot be used in steps until :meth:`connect` has made a new connection.
    """

    store: ShardStore
    """The shard's store, for cold calls: create, write, seal, read, drop."""

    @property
    def address(self) -> str:
        """``host:port`` at which other shards reach the shard, to import its spans. Empty if they cannot: the
        store is in the engine's process."""

    @property
    def transport(self) -> Transport | None:
        """The transport of hot frames. None while there is no connection for them."""

    @property
    def native_connection(self) -> NativeConnection | None:
        """The connection for hot frames if it is native (shared memory or TCP); None otherwise. One native
        call of :class:`~farshore.attention_offload.fanout.native_fanout.NativeFanout` serves several."""

    @property
    def bulk_transport(self) -> Transport | None:
        """The transport of bulk KV. None while there is no connection for it."""

    def identify(self) -> ShardIdentity:
        """Asks the shard for its identity and its free memory. Raises TransportError if it does not
        answer."""

    @property
    def ready(self) -> bool:
        """Whether there is an open connection for hot frames; also for the second connection, if
        :meth:`second_connection` was called."""

    def connect(self) -> Transport:
        """Makes each connection that :attr:`ready` reports as missing and leaves open ones alone. Returns the
        transport. The next :meth:`begin` uses the new connection. Blocks until a deadline that the
        implementation sets, then raises TransportError."""

    def beat(self, wanted: Wanted | None) -> ShardBeat:
        """Renews the lease on the engine's holds at the shard. ``wanted`` lists every span that the engine
        wants to hold there; the shard drops its other holds. None renews without dropping any."""

    def import_span(
        self, address: str, span: SpanId, *, tokens: int, holder: SequenceId, deadline_s: float
    ) -> Imported:
        """Lets the shard copy a span of the shard at ``address``, of which at least the first ``tokens`` are
        sealed and which ``holder`` holds there. Thread-safe; blocks until the copy is made.

        The shard keeps the copy for some seconds: a sequence must hold it meanwhile. Idempotent: while the
        copy exists, the same span is not copied again. Raises Full, Overloaded, Corrupt, TransportError, and
        what the other shard answers: NotFound, InvalidRequest."""

    def begin(
        self, step: ShardStep, *, deadline_s: float = MOST_DEADLINE_S, drain_s: float = MOST_DEADLINE_S
    ) -> None:
        """Announces a step. First reads and discards the outstanding answers of a dropped step, for at most
        ``drain_s``. ``deadline_s`` bounds this send and each later send of the step."""

    def send(self, layer: int, micro_batch: int, q: Tensor) -> Any:
        """Sends q ``[rows, heads, k_dim]``: the rows and heads that the shard sees of the micro-batch, at
        least one row. Returns a token for :meth:`wait`. The rows need not be contiguous: q may be a slice of
        the heads of a larger tensor."""

    def wait(self, sent: Any, *, out: State | None = None, deadline_s: float = MOST_DEADLINE_S) -> State:
        """Blocks until the shard answers the frame ``sent``. Raises Late after ``deadline_s``.

        Returns the shard's state: o ``[rows, heads, v_dim]`` in q's dtype, and lse ``[rows, heads]`` in
        float32 (float64 if q is float64). The state is valid until the next wait. If ``out`` is given, the
        result is written there; its rows need not be contiguous, but the heads of each row must be."""

    def break_off(self) -> None:
        """Closes the connection for hot frames, because it failed or must not be used any more."""

    def second_connection(self) -> "ShardClient":
        """A client with a second connection to the same shard, for a step that runs at the same time
        as one on this client. Every call returns the same client. It is connected and closed together with
        this one."""

    def close(self) -> None:
        """Closes all connections to the shard."""
