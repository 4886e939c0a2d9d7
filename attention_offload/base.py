"""What an engine and its shards agree on, and how an engine sees all of its shards together.

A hot frame is a pure read: it may be retried or thrown away, and nothing remote changes.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from farshore.attention_offload.plan.step_plan import StepPlan
from farshore.ids import Epoch, SequenceId, SpanId, WorkerId
from farshore.kernels.base import AttentionSpec, KVLayout, State


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
