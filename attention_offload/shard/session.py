"""Executes the steps of one connection at the shard, for all transports: a step first, then its layer frames.

Called by ``shard.service`` (gRPC), ``shard.frame_loop`` (native) and ``client.in_process``. It looks spans up
in the store and calls the kernels. It must not know transports or who owns a sequence.
"""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farshore.attention_offload.base import AttentionModel, ShardIdentity
from farshore.attention_offload.plan.step_plan import Read, ShardStep
from farshore.attention_offload.shard import checks
from farshore.attention_offload.shard.staged_frames import StagedFrame
from farshore.attention_offload.transport.frames import frame_bytes
from farshore.errors import InvalidRequest
from farshore.ids import WorkerId
from farshore.kernels.base import AttentionSpec, Segments, State, WorkList
from farshore.kernels.formats import DTYPE_CODES, NATIVE_DTYPES
from farshore.kernels.host import HOST, address
from farshore.kernels.select import implementation
from farshore.kvstore.base import Removals, ShardStore

MOST_SEGMENTS = 1 << 18
"""The most segments of a step. A segment counts once for each micro-batch that reads it."""


class AttendedBytes:
    """Counts the KV bytes that all connections of a shard have attended to. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counted = 0
        self.native = torch.zeros(1, dtype=torch.int64, device=HOST)
        """i64 [1]: the share of the native loops, which they add to atomically."""

    @property
    def total(self) -> int:
        return self._counted + int(self.native)

    def add(self, count: int) -> None:
        with self._lock:
            self._counted += count


def identity_of(worker: WorkerId, store: ShardStore, attended: AttendedBytes) -> ShardIdentity:
    """The worker, this process, its store, and the store's present memory use."""
    usage = store.usage()
    return ShardIdentity(
        worker,
        os.getpid(),
        socket.gethostname(),
        usage.budget_bytes,
        usage.available_bytes,
        attended.total,
        store.incarnation,
        usage.cached_bytes,
    )


class _Frame(NamedTuple):
    """What answers one layer frame."""

    spec: AttentionSpec
    layer_class: int
    stored_layer: int
    rows: int
    heads: int
    plan: Any
    layer_bytes: int


class ShardSession:
    """Executes one connection's steps, one at a time. Not thread-safe: one thread serves a connection."""

    def __init__(self, store: ShardStore, model: AttentionModel, attended: AttendedBytes) -> None:
        """``model`` must have passed :func:`farshore.attention_offload.shard.checks.check_model`."""
        self._store = store
        self._model = model
        self._attended = attended
        self._step: ShardStep | None = None
        self._removals = Removals()
        """How often a sequence of the step gave back holds."""
        self._seen_removals = 0
        """That count when the step's spans were looked up."""
        # A span numbers its layers within their class.
        counts = [count() for _ in model.specs]
        self._stored_layers = [next(counts[layer_class]) for layer_class in model.layer_class]
        device = store.memory.device
        self._kernels = [implementation(device, dtype=layout.format.dtype) for layout in model.layouts]
        self._stream = None if store.runtime is None else store.runtime.stream()
        """Where a store on a device attends; None for host memory."""
        self._staged: dict[tuple[int, int], StagedFrame] = {}
        """By layer class and micro-batch: memory that fits the last step's frames."""
        self._plans: list[list[tuple[Any, int]]] = []
        """[layer class][micro-batch]: the kernel plan, and the KV bytes that it reads in one layer."""
        self._segment_count = 0

    def begin(self, step: ShardStep) -> None:
        """Starts a step: looks every read up and makes the kernel plans.

        Raises NotFound if a span is not in the store or not held by the read's holder. Raises InvalidRequest
        for a step beyond the limits of ``shard.checks``, a read that does not match its span, or tokens that
        are not sealed."""
        self._step = None
        checks.check_step(step, self._model)
        self._store.watch(self._removals, {read.holder for reads in step.reads for read in reads})
        removals = int(self._removals.count)
        self._look_up(step)
        self._segment_count = 0
        self._plans = [
            [self._plan(step, layer_class, index) for index in range(len(step.micro_batches))]
            for layer_class in range(len(step.reads))
        ]
        self._step, self._seen_removals = step, removals

    def repeat_step(self, step: int) -> None:
        """Starts step number ``step`` with the reads of the previous step.

        Keeps the kernel plans, and looks the spans up again only if a hold was dropped since. Raises as
        :meth:`begin`, and InvalidRequest if there is no previous step or a layer has a window."""
        if self._step is None:
            raise InvalidRequest(f"step {step} repeats the step before it, but there was none")
        if self._model.has_windows:
            raise InvalidRequest(f"step {step} must state its positions: a layer of the model has a window")
        self.recheck_spans(step)

    def recheck_spans(self, number: int | None = None) -> None:
        """Raises NotFound if the current step reads a span whose hold was dropped since the last look-up.

        Looks spans up only if a sequence of the step has dropped any. The kernel plans stay valid: a span
        never moves. ``number`` becomes the step's number if it is given."""
        step = self._step
        if step is None:
            return
        if number is not None:
            self._step = step = replace(step, step=number)
        removals = int(self._removals.count)
        if removals != self._seen_removals:
            self._step = None
            self._look_up(step)
            self._step, self._seen_removals = step, removals

    def attend(
        self, step: int, layer: int, micro_batch: int, q: Tensor, *, out: State | None = None
    ) -> State:
        """Computes the partial attention of one layer frame.

        q is ``[rows of the micro-batch, heads, k_dim]``. Returns o ``[rows, heads, v_dim]`` in q's dtype and
        lse ``[rows, heads]``, in ``out`` if it is given. Raises InvalidRequest for a frame that does not
        belong to the current step, and NotFound as :meth:`recheck_spans`."""
        frame = self._frame(step, layer, micro_batch)
        rows, heads, spec = frame.rows, frame.heads, frame.spec
        if q.shape != (rows, heads, spec.k_dim):
            raise InvalidRequest(f"q of shape {tuple(q.shape)}, expected {(rows, heads, spec.k_dim)}")
        if out is None:
            out = State.identity(rows, heads, spec.v_dim, dtype=q.dtype, device=q.device)
        if self._stream is None:
            with self._attending(frame):
                self._kernels[frame.layer_class].partial(frame.plan, frame.stored_layer, q, out=out)
            return out
        self.queries(step, layer, micro_batch, q.dtype).copy_(q)
        for field, staged in zip(out, self.attend_staged(step, layer, micro_batch), strict=True):
            field.copy_(staged)
        return out

    def queries(self, step: int, layer: int, micro_batch: int, dtype: torch.dtype) -> Tensor:
        """Host memory for q of a layer frame, ``[rows, heads, k_dim]``, to be overwritten before
        :meth:`attend_staged`. Raises as :meth:`attend`."""
        frame = self._frame(step, layer, micro_batch)
        runtime = self._store.runtime
        assert self._stream is not None and runtime is not None, "the store is in host memory"
        key = frame.layer_class, micro_batch
        staged = self._staged.get(key)
        if staged is None or not staged.fits(frame.rows, frame.heads, dtype):
            staged = self._staged[key] = StagedFrame(
                runtime, self._stream, frame.spec, rows=frame.rows, heads=frame.heads, dtype=dtype
            )
        return staged.q

    def attend_staged(self, step: int, layer: int, micro_batch: int) -> State:
        """As :meth:`attend`, of the memory of :meth:`queries`. The state is in host memory, valid until the
        next frame of the micro-batch."""
        frame = self._frame(step, layer, micro_batch)
        with self._attending(frame):
            staged = self._staged[frame.layer_class, micro_batch]
            return staged.attend(self._kernels[frame.layer_class], frame.plan, frame.stored_layer)

    def _frame(self, step: int, layer: int, micro_batch: int) -> "_Frame":
        """What answers a layer frame. Raises as :meth:`attend`."""
        self.recheck_spans()
        current = self._step
        if current is None or current.step != step:
            raise InvalidRequest(f"frame of step {step}, but step {current and current.step} is under way")
        spec = self.spec(layer)
        layer_class = self._model.layer_class[layer]
        heads = (current.group1 - current.group0) * spec.q_heads_per_group
        rows = self.rows(micro_batch)
        plan, layer_bytes = self._plans[layer_class][micro_batch]
        return _Frame(spec, layer_class, self._stored_layers[layer], rows, heads, plan, layer_bytes)

    @contextmanager
    def _attending(self, frame: "_Frame") -> Iterator[None]:
        """A context for the attention of one frame, which ends with the result in host memory."""
        try:
            yield
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        # Memory freed during the computation may belong to another span already. The result is valid only if
        # all spans are still held.
        self.recheck_spans()
        self._attended.add(frame.layer_bytes)

    def runs_natively(self, dtype: torch.dtype) -> bool:
        """Whether the native frame loop answers this session's frames, with q and o in ``dtype``."""
        on_host = self._stream is None and all(kernels.native for kernels in self._kernels)
        return on_host and dtype in NATIVE_DTYPES

    def is_staged(self, dtype: torch.dtype) -> bool:
        """Whether the native frame loop may ask :meth:`attend_staged` for the answers."""
        return self._stream is not None and dtype in NATIVE_DTYPES

    def native_step(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """The current step as the argument ``step`` of ``serve`` in ``attention_offload/native``; without
        plans if this session :meth:`is_staged`."""
        step = self._step
        assert step is not None, "no step was begun"
        groups = step.group1 - step.group0
        natively = self.runs_natively(dtype)
        work = []
        for spec, batches in zip(self._model.specs, self._plans, strict=True):
            heads = groups * spec.q_heads_per_group
            frames = []
            for rows, (plan, layer_bytes) in zip(step.micro_batches, batches, strict=True):
                sizes = frame_bytes(spec, rows=len(rows), heads=heads, dtype=dtype)
                frames.append((plan.native if natively else None, *sizes, layer_bytes))
            work.append(tuple(frames))
        layers = tuple(zip(self._model.layer_class, self._stored_layers, strict=True))
        counters = address(self._attended.native), address(self._removals.count)
        # Without windows positions do not matter: the native loop may repeat a step that it answers itself.
        repeats = natively and not self._model.has_windows
        return step.step, DTYPE_CODES[dtype], layers, tuple(work), *counters, self._seen_removals, repeats

    def rows(self, micro_batch: int) -> int:
        """The rows of a micro-batch of the current step. Raises InvalidRequest for an unknown micro-batch."""
        batches = self._step.micro_batches if self._step else ()
        if not 0 <= micro_batch < len(batches):
            raise InvalidRequest(f"micro-batch {micro_batch} of a step of {len(batches)}")
        return len(batches[micro_batch])

    def spec(self, layer: int) -> AttentionSpec:
        """The attention spec of a layer. Raises InvalidRequest for a layer that the model does not have."""
        if not 0 <= layer < len(self._model.layer_class):
            raise InvalidRequest(f"layer {layer} of a model of {len(self._model.layer_class)} layers")
        return self._model.specs[self._model.layer_class[layer]]

    def _plan(self, step: ShardStep, layer_class: int, micro_batch: int) -> tuple[Any, int]:
        """Makes a micro-batch's kernel plan. Returns it and the KV bytes that it reads in one layer."""
        spec = self._model.specs[layer_class]
        layout = self._model.layouts[layer_class]
        reads = step.micro_batch_reads(layer_class, micro_batch)
        work, segments = work_of(reads, self._store)
        self._segment_count += len(work)
        if self._segment_count > MOST_SEGMENTS:
            raise InvalidRequest(f"a step of over {MOST_SEGMENTS} segments: give fewer reads")
        group_bytes = layout.of_groups(1).layer_token_bytes
        group_tokens = sum((read.last - read.first) * (read.group1 - read.group0) for read in reads)
        try:
            plan = self._kernels[layer_class].plan(
                WorkList.of(work),
                Segments.concat(segments),
                self._store.memory,
                layout,
                spec,
                positions=torch.tensor(
                    [step.positions[row] for row in step.micro_batches[micro_batch]], device=HOST
                ),
                group0=step.group0,
                group1=step.group1,
                threads=torch.get_num_threads(),
                send=None if self._stream is None else self._stream.send,
            )
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        return plan, group_tokens * group_bytes

    def _look_up(self, step: ShardStep) -> None:
        """Checks every read against its span. Raises as :meth:`begin`."""
        for layer_class, (layout, reads) in enumerate(zip(self._model.layouts, step.reads, strict=True)):
            for read in reads:
                stored = self._store.look_up(read.span, holder=read.holder)
                checks.check_read(read, stored, layer_class, layout)


def work_of(
    reads: Sequence[Read], store: ShardStore
) -> tuple[list[tuple[int, int, int, int, int]], list[Segments]]:
    """Translates reads into a kernel's work items and segments.

    Returns (work, segments): work item i is (first row, rows, segment i, first group, end of groups), as
    :meth:`WorkList.of` takes it; ``segments`` has one entry per read, to be concatenated. Raises NotFound for
    an unknown span, and InvalidRequest for tokens that are not sealed or more than MOST_SEGMENTS segments."""
    work: list[tuple[int, int, int, int, int]] = []
    segments: list[Segments] = []
    for read in reads:
        found = store.segments(read.span, read.first - read.origin, read.last - read.origin)
        segments.append(found)
        for _ in range(found.size):
            work.append((read.rows.start, len(read.rows), len(work), read.group0, read.group1))
        if len(work) > MOST_SEGMENTS:
            raise InvalidRequest(f"reads of over {MOST_SEGMENTS} segments: give fewer")
    return work, segments
