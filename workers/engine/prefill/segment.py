"""Prefill of one segment of a prompt, layer by layer, in units between which decode steps may run.

A segment of S tokens is cut into chunks. The work of one layer::

    project   each chunk: q, k, v                                  ─▶ k, v to their shards, in the background
    attend    each past range, pulled one ahead, × each chunk: its state is merged into the chunk's
    finish    each chunk: attention to the segment itself, merge, the rest of the layer

A unit is one of these operations for one chunk. On a device it submits its work, and the host stays one unit
ahead. Past KV is pulled once per segment, so a larger S pulls less.
Memory is bounded by S hidden states, the q, k, v and states of one layer, and two past ranges of one layer,
independent of the prompt's length. Pulls and writes run in the shards' queues: a segment yields the calls
that it depends on, and never waits for one.

Called by ``prompts``, by the engine's probe, and by benchmarks. It must not know what is decoded meanwhile.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.client.base import ShardClient
from farshore.ids import WorkerId
from farshore.kernels.base import Kernels, State
from farshore.kernels.runtime.base import DeviceRuntime, Event
from farshore.kvstore.store.layout import forms
from farshore.models.llama import Llama
from farshore.workers.engine.attention_model import merged_dtype
from farshore.workers.engine.kv import span_writer
from farshore.workers.engine.kv.pool import ShardPool
from farshore.workers.engine.logprobs import check_finite, logprobs_of, rank_of
from farshore.workers.engine.prefill.kv_copies import KV, KVCopies, Pulled
from farshore.workers.engine.sequence import PlacedSpan, PromptToken, Sequence

CHUNK_TOKENS = 256
"""Rows of a unit. A unit takes 2 to 20 ms (SmolLM2, two cores), and its states fit in one core's cache."""
DEVICE_CHUNK_TOKENS = 2048
"""Rows of a unit on a device: a model of 8B parameters has 0.9 TFLOP for them in a layer."""

LOGITS_BYTES = 8 << 20
"""Most bytes of logits computed at a time for the log-probabilities of a prompt: 42 rows of SmolLM2."""

PAST_RANGE_TOKENS = 4096
"""Most past tokens that a unit attends to."""

Unit = Callable[[], None]
"""One unit of work; runs on the engine's thread."""


class _PastRange(NamedTuple):
    """Positions ``first .. last`` (end excluded) before the segment, stored in one span."""

    span: PlacedSpan
    first: int
    last: int


class PrefillSegment:
    """Computes positions ``first .. last`` (end excluded) of a sequence's prompt. Not thread-safe.

    Run all of :meth:`units`, then seal the spans: only sealed positions may be committed. To stop before the
    end, call :meth:`close`; the segment cannot be resumed. ``logits_of`` is the number of positions at the
    segment's end whose logits are computed. ``scored_from``: the first position that gives the
    log-probability of the prompt's token after it; None: no position does. ``local``: the worker whose spans
    lie on the runtime's device, if any.
    """

    def __init__(
        self,
        sequence: Sequence,
        first: int,
        last: int,
        *,
        model: Llama,
        attention: AttentionModel,
        kernels: Kernels[Any],
        pool: ShardPool,
        runtime: DeviceRuntime,
        local: WorkerId | None,
        logits_of: int,
        scored_from: int | None = None,
    ) -> None:
        self.sequence = sequence
        self.first, self.last = first, last
        self.logits: Tensor | None = None
        """f32[logits_of, vocab] after all units have run; None if ``logits_of`` is 0."""
        self.prompt_tokens: list[PromptToken] = []
        """The tokens after the scored positions, in order."""
        self._scored = range(
            last if scored_from is None else scored_from, min(last, sequence.prompt_tokens - 1)
        )
        self.layers_done = 0
        self._model = model
        self._attention = attention
        self._pool = pool
        self._logits_of = logits_of
        self._layout = layout = attention.layouts[0]
        self._spec = spec = attention.specs[0]
        self._kernels = kernels
        self._runtime = runtime
        self._under_way: deque[tuple[Event, KV | None]] = deque()
        """Behind each of the last units, with the past k and v that it reads, which must live until then."""
        chunk_tokens = CHUNK_TOKENS if runtime.is_host else DEVICE_CHUNK_TOKENS
        self._chunks = [
            slice(start, min(start + chunk_tokens, last - first))
            for start in range(0, last - first, chunk_tokens)
        ]
        device = model.device
        self._positions = torch.arange(first, last, device=device)
        self._h = model.embed(torch.tensor(sequence.tokens[first:last], device=device))
        n = last - first
        self._q = torch.empty(n, spec.q_heads, spec.k_dim, dtype=model.dtype, device=device)
        # Token-major, as projections write them. `extend` and the stores take the head-major views below.
        self._projected = (
            torch.empty(n, layout.k_heads, layout.k_dim, dtype=model.dtype, device=device),
            torch.empty(n, layout.v_heads, layout.v_dim, dtype=model.dtype, device=device),
        )
        self._k, self._v = (tensor.transpose(0, 1) for tensor in self._projected)
        self._stored: KV | None = None
        """k and v as bytes, if the format is quantised."""
        if layout.format.quantised:
            k_bytes, v_bytes = forms.stored_bytes(layout)
            self._stored = (
                torch.empty(layout.k_heads, n, k_bytes, dtype=torch.uint8, device=device),
                torch.empty(layout.v_heads, n, v_bytes, dtype=torch.uint8, device=device),
            )
        self._copies = KVCopies(
            runtime, self._stored or self._projected, token_major=self._stored is None, local=local
        )
        state_dtype = merged_dtype(model.dtype)
        new = partial(State.identity, heads=spec.q_heads, v_dim=spec.v_dim, device=device)
        self._past_states = [new(chunk.stop - chunk.start, dtype=state_dtype) for chunk in self._chunks]
        chunk_rows = min(n, chunk_tokens)
        self._states = [new(chunk_rows, dtype=state_dtype) for _ in range(2)]
        self._out = new(chunk_rows, dtype=model.dtype)
        self._past_ranges = _past_ranges(sequence, first)
        self._pulls: dict[int, Future[Pulled]] = {}
        self._pulled: KV | None = None
        """k and v of the past range that is attended to now."""

    @property
    def done_tokens(self) -> int:
        """Prompt tokens done so far. The segment's tokens count in proportion to the layers done."""
        return self.first + (self.last - self.first) * self.layers_done // self._model.config.layers

    def units(self) -> Iterator[Unit | Future[Any]]:
        """Yields units, in order, and calls to shards that must succeed before the next item is taken.

        Raises the error of a failed pull when the item after it is taken.
        """
        layers = self._model.config.layers
        for layer in range(layers):
            for index in range(len(self._chunks)):
                yield partial(self._unit, self._project, layer, index)
            writes = self._start_writing(layer)
            chunk_rows = self._attending_rows(layer)
            for range_index in range(len(self._past_ranges) if chunk_rows else 0):
                pull = self._pull(layer, range_index)
                yield pull
                self._pulled = self._copies.on_device(pull.result(), self._model.dtype)
                self._pull_next(layer, range_index)
                for index, rows in chunk_rows:
                    yield partial(self._unit, self._attend, range_index, index, rows)
            for index, rows in chunk_rows:
                yield partial(self._unit, self._finish, layer, index, rows)
            yield from writes
            self.layers_done = layer + 1
        rows = max(1, LOGITS_BYTES // (4 * self._model.config.vocab))
        for start in range(self._scored.start, self._scored.stop, rows):
            yield partial(self._score, start, min(start + rows, self._scored.stop))
        if self._logits_of:
            yield self._compute_logits

    def close(self) -> None:
        """Cancels the pulls that have not started, and waits for the last unit. Running calls continue; they
        keep their memory alive."""
        for pull in self._pulls.values():
            pull.cancel()
        self._pulls.clear()
        for end, _ in self._under_way:
            end.wait()

    def _attending_rows(self, layer: int) -> list[tuple[int, slice]]:
        """Returns (chunk index, rows in that chunk) for the rows that need attention in ``layer``.

        All rows do, except in the last layer: there only the rows whose logits are computed do, and those
        between them.
        """
        is_last_layer = layer + 1 == self._model.config.layers
        first_row = self.last - self.first - self._logits_of if is_last_layer else 0
        if self._scored:
            first_row = min(first_row, self._scored.start - self.first)
        return [
            (index, slice(max(0, first_row - chunk.start), chunk.stop - chunk.start))
            for index, chunk in enumerate(self._chunks)
            if chunk.stop > first_row
        ]

    def _unit(self, work: Callable[..., None], *arguments: Any) -> None:
        """Submits the work of a unit, and waits for that of the unit before it."""
        work(*arguments)
        self._under_way.append((self._runtime.main.record(), self._pulled))
        if len(self._under_way) > 1:
            self._under_way.popleft()[0].wait()

    def _run(self, work: Callable[..., object], *arguments: Any, **options: Any) -> None:
        """Submits a call whose arguments do not change until it has run."""
        self._runtime.main.run(partial(work, *arguments, **options))

    def _project(self, layer: int, index: int) -> None:
        chunk = self._chunks[index]
        k, v = self._projected
        out = self._q[chunk], k[chunk], v[chunk]
        self._run(self._model.project, layer, self._h[chunk], self._positions[chunk], out=out)
        if self._stored is not None:
            self._run(self._quantise, self._stored, chunk)

    def _quantise(self, stored: KV, chunk: slice) -> None:
        """Prefill attends to the values as stored (invariant 5, docs/architecture.md)."""
        of_chunk = forms.to_stored(self._layout, self._k[:, chunk], self._v[:, chunk])
        for buffer, values in zip(stored, of_chunk, strict=True):
            buffer[:, chunk] = values
        dequantised = forms.from_stored(self._layout, *of_chunk, dtype=self._model.dtype)
        self._k[:, chunk], self._v[:, chunk] = dequantised

    def _attend(self, range_index: int, index: int, rows: slice) -> None:
        """Attends with one chunk's rows to the pulled past range, and merges the state into the chunk's."""
        assert self._pulled is not None
        past_range = self._past_ranges[range_index]
        k, v = self._pulled
        group0, group1 = past_range.span.group0, past_range.span.group1
        heads = slice(group0 * self._spec.q_heads_per_group, group1 * self._spec.q_heads_per_group)
        past = _view(self._past_states[index], rows, heads)
        row, n = self._chunks[index].start + rows.start, rows.stop - rows.start
        q = self._q[row : row + n, heads]
        if past_range.first == 0:  # The first range of these heads: there is no state to merge with yet.
            self._extend(q, k, v, row, past_range.first, past)
            return
        new, merged = (_view(state, slice(0, n), heads) for state in self._states)
        self._extend(q, k, v, row, past_range.first, new)
        self._run(self._kernels.merge, [past, new], out=merged)
        if past.o.shape == self._states[1].o.shape:
            self._past_states[index], self._states[1] = self._states[1], self._past_states[index]
        else:
            self._run(past.o.copy_, merged.o)
            self._run(past.lse.copy_, merged.lse)

    def _finish(self, layer: int, index: int, rows: slice) -> None:
        """Attends with one chunk's rows to the segment itself, merges, and runs the rest of the layer."""
        n, heads = rows.stop - rows.start, slice(0, self._spec.q_heads)
        chunk = self._chunks[index]
        within, out = _view(self._states[0], slice(0, n), heads), _view(self._out, slice(0, n), heads)
        segment_rows = slice(chunk.start + rows.start, chunk.start + rows.stop)
        q, k, v = self._q[segment_rows], self._k[:, : segment_rows.stop], self._v[:, : segment_rows.stop]
        if self._past_ranges:
            self._extend(q, k, v, segment_rows.start, self.first, within)
            self._run(self._kernels.merge, [_view(self._past_states[index], rows, heads), within], out=out)
        else:
            self._extend(q, k, v, segment_rows.start, self.first, out)
        h = self._h[segment_rows]
        self._run(self._model.finish, layer, h, out.o, out=h)

    def _extend(self, q: Tensor, k: Tensor, v: Tensor, row: int, k_position: int, out: State) -> None:
        self._run(
            self._kernels.extend,
            q,
            k,
            v,
            self._spec,
            q_positions=self._positions[row : row + len(q)],
            k_position=k_position,
            out=out,
            threads=torch.get_num_threads(),
        )

    def _pull(self, layer: int, range_index: int) -> Future[Pulled]:
        """Returns the pull of a past range's k and v; starts it unless it was started ahead."""
        number = layer * len(self._past_ranges) + range_index
        return self._pulls.pop(number, None) or self._start_pull(number)

    def _pull_next(self, layer: int, range_index: int) -> None:
        """Starts the pull of the next past range, to overlap it with attention to the current one."""
        number = layer * len(self._past_ranges) + range_index + 1
        if number < self._model.config.layers * len(self._past_ranges) and self._attending_rows(
            number // len(self._past_ranges)
        ):
            self._pulls[number] = self._start_pull(number)

    def _start_pull(self, number: int) -> Future[Pulled]:
        """Pulls are numbered layer by layer, past range by past range."""
        layer, range_index = divmod(number, len(self._past_ranges))
        placed, first, last = self._past_ranges[range_index]
        # The span may move before the call is made.
        worker, span, origin = placed.worker, placed.span, placed.origin
        return self._pool[worker].submit(
            lambda client: self._copies.pin(
                worker,
                client.store.read(
                    span,
                    layer,
                    first - origin,
                    last - origin,
                    sequence=self.sequence.id,
                    dtype=self._model.dtype,
                ),
            )
        )

    def _start_writing(self, layer: int) -> list[Future[None]]:
        """Starts the writes of one layer's k and v to the spans that are not sealed yet."""
        self._copies.begin_layer()
        holder = self.sequence.placed_holder
        calls = []
        for span in self.sequence.spans:
            start, end = max(self.first, span.sealed), min(self.last, span.last)
            if start < end:
                tokens = slice(start - self.first, end - self.first)
                call = partial(
                    _write,
                    self._copies.reader(span.worker),
                    tokens,
                    span=span,
                    layer=layer,
                    position=start,
                    layout=self._layout,
                    holder=holder,
                )
                calls.append(self._pool[span.worker].submit(call))
        return calls

    def _score(self, first: int, last: int) -> None:
        """Appends to ``prompt_tokens`` what the logits of positions ``first .. last`` (end excluded) say of
        the tokens after them."""
        count = self.sequence.sampling.prompt_logprobs or 0
        rows = self._logits(self._h[first - self.first : last - self.first]).cpu().numpy()
        check_finite(rows)
        for row, token in zip(rows, self.sequence.tokens[first + 1 : last + 1], strict=True):
            found = logprobs_of(row, token, alternatives=count)
            self.prompt_tokens.append(PromptToken(token, found.logprob, rank_of(row, token), found.top))

    def _compute_logits(self) -> None:
        self.logits = self._logits(self._h[len(self._h) - self._logits_of :])

    def _logits(self, h: Tensor) -> Tensor:
        """The logits of hidden states, for plain calls of PyTorch."""
        if self._runtime.is_host:
            return self._model.logits(h)
        logits = torch.empty(len(h), self._model.config.vocab, dtype=torch.float32, device=h.device)
        self._run(lambda: logits.copy_(self._model.logits(h)))
        self._runtime.settle()
        return logits


def _past_ranges(sequence: Sequence, until: int) -> list[_PastRange]:
    """Cuts positions ``[0, until)`` into past ranges, in span order."""
    past_ranges = []
    for span in sorted(sequence.spans, key=lambda span: (span.first, span.group0)):
        for first in range(span.first, min(span.last, until), PAST_RANGE_TOKENS):
            past_ranges.append(_PastRange(span, first, min(first + PAST_RANGE_TOKENS, span.last, until)))
    return past_ranges


def _write(read: Callable[[], KV], tokens: slice, client: ShardClient, **options: Any) -> None:
    """Writes ``tokens`` of a layer's k and v to a span. Runs in the shard's queue."""
    k, v = read()
    span_writer.write(client, k=k[:, tokens], v=v[:, tokens], **options)


def _view(state: State, rows: slice, heads: slice) -> State:
    return State(state.o[rows, heads], state.lse[rows, heads])
