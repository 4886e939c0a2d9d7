"""The interface between an engine and one shard. Implemented in this folder, by every transport alike."""

from typing import Any, Protocol

from torch import Tensor

from farshore.attention_offload.base import ShardBeat, ShardIdentity, Wanted
from farshore.attention_offload.plan.step_plan import ShardStep
from farshore.attention_offload.transport.frames import MOST_DEADLINE_S, Transport
from farshore.attention_offload.transport.native_connection import NativeConnection
from farshore.kernels.base import State
from farshore.kvstore.base import ShardStore


class ShardClient(Protocol):
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
    def frames(self) -> NativeConnection | None:
        """Its connection for hot frames where that is native: several are served by one call of an
        :class:`~farshore.attention_offload.fanout.native_fanout.NativeFanout`. None elsewhere."""

    @property
    def bulk_transport(self) -> Transport | None:
        """What carries the store's KV; None while nothing is connected."""

    def identify(self) -> ShardIdentity: ...

    @property
    def ready(self) -> bool:
        """Whether there is a connection for hot frames; the second connection's too, where there is a
        second connection."""

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

    def second_connection(self) -> "ShardClient":
        """A second connection to the same shard, for a step beside this one's. Always the same; connected
        and closed with this one."""

    def close(self) -> None: ...
