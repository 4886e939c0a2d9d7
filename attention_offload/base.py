"""Defines what an engine and its shards agree on, and the engine's interface to all of its shards.

Used by the engine's decode step and by every folder of this package but ``plan``. It must not know transports
or stores.

A hot frame is a pure read: the engine may retry or discard it, and nothing changes at the shard.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from farshore.attention_offload.plan.step_plan import StepPlan
from farshore.ids import Epoch, SequenceId, SpanId, WorkerId
from farshore.kernels.base import AttentionSpec, KVLayout, State
from farshore.kvstore.base import SpanKey


class AttentionModel(NamedTuple):
    """The attention shapes of a model. Both ends of a connection use the same one to interpret frames."""

    specs: tuple[AttentionSpec, ...]
    """The shape of each layer class."""
    layer_class: tuple[int, ...]
    """The layer class of each layer of the model."""
    layouts: tuple[KVLayout, ...]
    """The layout of each layer class in blocks that hold all its KV-head groups. A span with fewer groups has
    the layout ``of_groups``."""

    @property
    def has_windows(self) -> bool:
        """Whether a layer class has a window. The positions of a step's rows then decide, besides the reads,
        which tokens a row attends to."""
        return any(spec.window_tokens for spec in self.specs)


class ShardIdentity(NamedTuple):
    """A shard's answer to ``Identify``."""

    worker: WorkerId
    process_id: int
    host: str
    budget_bytes: int
    free_bytes: int
    attended_bytes: int
    """The KV bytes that this shard has attended to since it started."""
    incarnation: str
    """The incarnation of the shard's store. A store of another incarnation has other spans, even if the
    worker id is the same."""
    cached_bytes: int
    """Of ``free_bytes``: spans without holds."""


class Caller(NamedTuple):
    """Identifies the engine that makes a cold call, and the call."""

    engine: str
    """The engine's incarnation."""
    sent_ns: int
    """When the engine sent the call, by the engine's monotonic clock."""


Wanted = Mapping[tuple[SequenceId, Epoch], Collection[SpanId]]
"""All spans that an engine still wants to hold at one shard, by sequence and epoch."""


class ShardBeat(NamedTuple):
    """A shard's answer to an engine's beat. The beat renews the lease on the engine's holds."""

    worker: WorkerId
    incarnation: str
    budget_bytes: int
    free_bytes: int
    attended_bytes: int
    must_reconcile: bool
    """The engine's next beat must list all spans that the engine wants: the shard may still hold spans that
    the engine has given up."""


class Imported(NamedTuple):
    """A span in a shard's store that is the copy of another shard's span."""

    span: SpanId
    key: SpanKey
    """Its positions and groups are those of the copied span. Its sequence is none that runs, so that no
    sequence may write to the span."""
    layout: KVLayout
    tokens: int
    """The number of its tokens. All of them are sealed."""


class Shards(Protocol):
    """All the shards of one engine. Not thread-safe: the engine's loop calls it.

    ``begin``, ``send`` and ``wait`` raise Late or Lost, which name the shards, or the error with which a
    shard refused the step. The caller must then drop the step.
    """

    def begin(self, plan: StepPlan, micro_batches: Sequence[range]) -> None:
        """Announces a step to the shards that it reads from. ``micro_batches`` are ranges of the step's rows,
        in order and without a gap."""

    def overlaps(self, micro_batch: int) -> bool:
        """Whether a shard can compute this micro-batch while the engine computes. The engine should then send
        q before it computes the attention over its own tokens."""

    def send(self, layer: int, micro_batch: int, q: Tensor) -> None:
        """Sends q ``[rows of the micro-batch, q_heads, k_dim]`` to every shard of the step. The caller must
        not change q before :meth:`wait` returns."""

    def wait(self, layer: int, micro_batch: int) -> Sequence[State]:
        """Blocks until all shards have answered the frame. Returns one state per shard, in span order, each
        over all rows and heads of the micro-batch. Frames must be waited for in the order of the sends."""
