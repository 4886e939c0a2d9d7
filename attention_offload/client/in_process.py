"""Implements the shard client for a store in the engine's own process, without a transport.

Called by the dense worker for spans in the engine's local store (placement ``local``), and by tests. It must
not know connections.
"""

from torch import Tensor

from farshore.attention_offload.base import AttentionModel, Imported, ShardBeat, ShardIdentity, Wanted
from farshore.attention_offload.plan.step_plan import ShardStep
from farshore.attention_offload.shard.session import AttendedBytes, ShardSession, identity_of
from farshore.attention_offload.transport.frames import MOST_DEADLINE_S, Transport
from farshore.errors import InvalidRequest
from farshore.ids import SequenceId, SpanId, WorkerId
from farshore.kernels.base import State
from farshore.kvstore.base import ShardStore


class InProcessClient:
    """A :class:`~farshore.attention_offload.client.base.ShardClient` that calls the shard's session directly.
    It never raises TransportError."""

    transport = bulk_transport = Transport.IN_PROCESS
    native_connection = None
    ready = True
    address = ""

    def __init__(
        self,
        worker: WorkerId,
        store: ShardStore,
        model: AttentionModel,
        *,
        attended: AttendedBytes | None = None,
    ) -> None:
        """``attended`` counts the KV bytes that this client attends to; None for a new counter."""
        self.store = store
        self._worker = worker
        self._model = model
        self._attended = attended or AttendedBytes()
        self._session = ShardSession(store, model, self._attended)
        self._step = 0
        self._second_connection: InProcessClient | None = None

    def identify(self) -> ShardIdentity:
        return identity_of(self._worker, self.store, self._attended)

    def connect(self) -> Transport:
        return self.transport

    def beat(self, wanted: Wanted | None) -> ShardBeat:
        """Reports the store's memory. ``wanted`` is ignored: no call can be lost in process, so the engine
        holds exactly the spans that it wants."""
        usage = self.store.usage()
        return ShardBeat(
            self._worker,
            self.store.incarnation,
            usage.budget_bytes,
            usage.available_bytes,
            self._attended.total,
            must_reconcile=False,
        )

    def import_span(
        self, address: str, span: SpanId, *, tokens: int, holder: SequenceId, deadline_s: float
    ) -> Imported:
        """InvalidRequest: an engine's own store imports nothing."""
        raise InvalidRequest(f"{self._worker} is in the engine's process: it imports no spans")

    def begin(
        self, step: ShardStep, *, deadline_s: float = MOST_DEADLINE_S, drain_s: float = MOST_DEADLINE_S
    ) -> None:
        self._step = step.step
        self._session.begin(step)

    def send(self, layer: int, micro_batch: int, q: Tensor) -> tuple[int, int, Tensor]:
        return layer, micro_batch, q

    def wait(
        self,
        sent: tuple[int, int, Tensor],
        *,
        out: State | None = None,
        deadline_s: float = MOST_DEADLINE_S,
    ) -> State:
        """Computes the attention. The fan-out calls this after the frames to the other shards were sent, so
        that all compute at the same time."""
        return self._session.attend(self._step, *sent, out=out)

    def second_connection(self) -> "InProcessClient":
        if self._second_connection is None:
            self._second_connection = InProcessClient(
                self._worker, self.store, self._model, attended=self._attended
            )
        return self._second_connection

    def break_off(self) -> None:
        pass

    def close(self) -> None:
        pass
