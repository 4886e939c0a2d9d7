"""The shard's end of the wire, whatever the transport: a step in, then one state per layer frame.

Called by transports. Knows the store's segments and the kernels; knows nothing of sequences' owners.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.plan.step_plan import Read, ShardStep
from farshore.attention_offload.shard import checks as door
from farshore.attention_offload.transport.frames import frame_bytes
from farshore.errors import InvalidRequest
from farshore.kernels.base import AttentionSpec, Segments, State, WorkList
from farshore.kernels.formats import DTYPE_CODES, NATIVE_DTYPES
from farshore.kernels.select import implementation
from farshore.kvstore.base import ShardStore

MOST_SEGMENTS = 1 << 18
"""Of a step: stretches of adjacent blocks, counted anew for each micro-batch that reads them."""


class AttendedBytes:
    """KV bytes attended to, over all connections of a shard. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counted = 0
        self.native = torch.zeros(1, dtype=torch.int64)
        """Native loops count here, atomically."""

    @property
    def total(self) -> int:
        return self._counted + int(self.native)

    def add(self, count: int) -> None:
        with self._lock:
            self._counted += count


class ShardSession:
    """One engine's stream of steps. Not thread-safe: a stream has one reader."""

    def __init__(self, store: ShardStore, model: AttentionModel, attended: AttendedBytes) -> None:
        """``model``: checked, see :func:`farshore.attention_offload.shard.checks.check_model`."""
        self._store = store
        self._model = model
        self._attended = attended
        self._step: ShardStep | None = None
        self._removals = 0
        """Of the store, when the step's spans were looked up."""
        # Stored layers are numbered inside their class.
        counts = [count() for _ in model.specs]
        self._stored_layers = [next(counts[it]) for it in model.layer_class]
        self._kernels = [implementation(store.memory.device, layout.format.dtype) for layout in model.layouts]
        self._prepared: list[list[tuple[Any, int]]] = []
        self._segments = 0

    def begin(self, step: ShardStep) -> None:
        """Look every read up and prepare the kernels. Raises NotFound for a span that is not here or not held
        by the read's holder, or InvalidRequest for a read that is not of that span, or of tokens that are not
        sealed."""
        self._step = None
        door.check_step(step, self._model)
        removals = int(self._store.removals)
        self._look_up(step)
        self._segments = 0
        self._prepared = [
            [self._prepare(step, layer_class, index) for index in range(len(step.micro_batches))]
            for layer_class in range(len(step.reads))
        ]
        self._step, self._removals = step, removals

    def repeat_step(self, step: int) -> None:
        """A step that reads what the one before it did: what was looked up is looked up again only where a
        hold was given back since. Raises as :meth:`begin`."""
        if self._step is None:
            raise InvalidRequest(f"step {step} is to read what the one before it did, but there was none")
        if self._model.has_windows:
            raise InvalidRequest(f"step {step} must say its positions: a layer of the model has a window")
        self.look_again(step)

    def look_again(self, number: int | None = None) -> None:
        """Raises NotFound where the step under way reads what was given back since it was looked up. Where it
        lies has not changed: a span never moves. ``number``: the step's, where it is repeated."""
        step = self._step
        if step is None:
            return
        if number is not None:
            self._step = step = replace(step, step=number)
        removals = int(self._store.removals)
        if removals != self._removals:
            self._step = None
            self._look_up(step)
            self._step, self._removals = step, removals

    def attend(
        self, step: int, layer: int, micro_batch: int, q: Tensor, *, out: State | None = None
    ) -> State:
        """Partial attention of one layer frame: q ``[rows of the micro-batch, heads, k_dim]`` -> o in q's
        dtype, and lse, in ``out`` where given."""
        self.look_again()
        current = self._step
        if current is None or current.step != step:
            raise InvalidRequest(f"frame of step {step}, but step {current and current.step} is under way")
        spec = self.spec(layer)
        layer_class = self._model.layer_class[layer]
        heads = (current.group1 - current.group0) * spec.q_heads_per_group
        rows = self.rows(micro_batch)
        if q.shape != (rows, heads, spec.k_dim):
            raise InvalidRequest(f"q of shape {tuple(q.shape)}, expected {(rows, heads, spec.k_dim)}")
        plan, layer_bytes = self._prepared[layer_class][micro_batch]
        if out is None:
            out = State.identity(rows, heads, spec.v_dim, dtype=q.dtype)
        try:
            self._kernels[layer_class].partial(plan, self._stored_layers[layer], q, out=out)
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        # Memory given back meanwhile may be another span's: what was read is good only if it is still held.
        self.look_again()
        self._attended.add(layer_bytes)
        return out

    def runs_natively(self, dtype: torch.dtype) -> bool:
        """Whether a native loop can attend in this session's stead, q and o in ``dtype``."""
        return all(kernels.native for kernels in self._kernels) and dtype in NATIVE_DTYPES

    def native_step(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """The step under way as ``attention_offload/native`` takes it; see ``serve`` there."""
        step = self._step
        assert step is not None, "no step was begun"
        groups = step.group1 - step.group0
        work = []
        for spec, batches in zip(self._model.specs, self._prepared, strict=True):
            heads = groups * spec.q_heads_per_group
            work.append(
                tuple(
                    (plan.native, *frame_bytes(spec, rows=len(rows), heads=heads, dtype=dtype), layer_bytes)
                    for rows, (plan, layer_bytes) in zip(step.micro_batches, batches, strict=True)
                )
            )
        layers = tuple(zip(self._model.layer_class, self._stored_layers, strict=True))
        counted = self._attended.native.data_ptr()
        watched = self._store.removals.data_ptr()
        # The loop repeats a step by itself where positions do not matter.
        repeats = not self._model.has_windows
        return step.step, DTYPE_CODES[dtype], layers, tuple(work), counted, watched, self._removals, repeats

    def rows(self, micro_batch: int) -> int:
        """Rows of one micro-batch's frames. Raises InvalidRequest for one the step does not have."""
        batches = self._step.micro_batches if self._step else ()
        if not 0 <= micro_batch < len(batches):
            raise InvalidRequest(f"micro-batch {micro_batch} of a step of {len(batches)}")
        return len(batches[micro_batch])

    def spec(self, layer: int) -> AttentionSpec:
        """The layer's shape. Raises InvalidRequest for a layer the model does not have."""
        if not 0 <= layer < len(self._model.layer_class):
            raise InvalidRequest(f"layer {layer} of a model of {len(self._model.layer_class)} layers")
        return self._model.specs[self._model.layer_class[layer]]

    def _prepare(self, step: ShardStep, layer_class: int, micro_batch: int) -> tuple[Any, int]:
        """The kernels' plan of one micro-batch, and the KV bytes that it reads in a layer."""
        spec = self._model.specs[layer_class]
        layout = self._model.layouts[layer_class]
        reads = step.micro_batch_reads(layer_class, micro_batch)
        work, segments = work_of(reads, self._store)
        self._segments += len(work)
        if self._segments > MOST_SEGMENTS:
            raise InvalidRequest(f"a step of over {MOST_SEGMENTS} stretches of blocks: give fewer reads")
        group_bytes = layout.of_groups(1).layer_token_bytes
        layer_bytes = sum((it.last - it.first) * (it.group1 - it.group0) for it in reads) * group_bytes
        try:
            plan = self._kernels[layer_class].plan(
                WorkList.of(work),
                Segments.concat(segments),
                self._store.memory,
                layout,
                spec,
                positions=torch.tensor([step.positions[row] for row in step.micro_batches[micro_batch]]),
                group0=step.group0,
                group1=step.group1,
                threads=torch.get_num_threads(),
            )
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        return plan, layer_bytes

    def _look_up(self, step: ShardStep) -> None:
        for layer_class, (layout, reads) in enumerate(zip(self._model.layouts, step.reads, strict=True)):
            for read in reads:
                stored = self._store.look_up(read.span, holder=read.holder)
                door.check_read(read, stored, layer_class, layout)


def work_of(
    reads: Sequence[Read], store: ShardStore
) -> tuple[list[tuple[int, int, int, int, int]], list[Segments]]:
    """The kernels' work for ``reads``, as :meth:`WorkList.of` takes it, and where in the store's memory the
    tokens lie. Raises NotFound, or InvalidRequest for tokens that are not sealed there."""
    work: list[tuple[int, int, int, int, int]] = []
    parts: list[Segments] = []
    for read in reads:
        parts.append(store.segments(read.span, read.first - read.origin, read.last - read.origin))
        for _ in range(parts[-1].size):
            work.append((read.rows.start, len(read.rows), len(work), read.group0, read.group1))
        if len(work) > MOST_SEGMENTS:
            raise InvalidRequest(f"reads of over {MOST_SEGMENTS} stretches of blocks: give fewer")
    return work, parts
