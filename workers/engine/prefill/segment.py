"""Prefill of one segment of one prompt, layer by layer, in units that decode steps may come between (design
§5).

A segment of S tokens is cut into chunks; in each layer::

    project   each chunk: q, k, v                                  ─▶ k, v to their shards, in the background
    attend    each piece of the past, pulled one ahead, × each chunk: its state is merged into the chunk's
    finish    each chunk: attention to the segment itself, merge, the layer's rest

A unit is one of these for one chunk. The past is pulled once a segment, so the larger S, the less is pulled.
Memory is bounded by S hidden states and states of one layer, and two pieces of past KV of one layer, however
long the prompt is. Pulls and writes go through the shards' queues: a segment says what it waits for, and
never waits itself. Called by ``prompts``; it must not know what is decoded meanwhile.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farshore.attention_offload.base import AttentionModel
from farshore.kernels.base import State
from farshore.kernels.select import implementation
from farshore.kvstore.store import forms
from farshore.models.llama import Llama
from farshore.workers.engine.kv import span_writer as spans
from farshore.workers.engine.kv.pool import Pool
from farshore.workers.engine.sequence import PlacedSpan, Sequence

CHUNK_TOKENS = 256
"""Rows of a unit: 2 to 20 ms of SmolLM2 on two cores, and its states stay in the cache of one."""

PIECE_TOKENS = 4096
"""Past tokens attended to in a unit."""

Unit = Callable[[], None]
"""Part of the work."""


class _Piece(NamedTuple):
    """Positions ``first .. last`` of the past, in a span."""

    span: PlacedSpan
    first: int
    last: int


class Segment:
    """Positions ``first .. last`` of a sequence's prompt on their way through the layers.

    Take all of :meth:`units`, then seal: only then are they committed. To give up half way, :meth:`close` it,
    and begin anew. ``logits_of``: how many positions at its end logits are wanted of.
    """

    def __init__(
        self,
        sequence: Sequence,
        first: int,
        last: int,
        *,
        model: Llama,
        attention: AttentionModel,
        pool: Pool,
        logits_of: int,
    ) -> None:
        self.sequence = sequence
        self.first, self.last = first, last
        self.logits: Tensor | None = None
        """f32[logits_of, vocab], once all units have run, if wanted."""
        self.layers_done = 0
        self._model = model
        self._attention = attention
        self._pool = pool
        self._logits_of = logits_of
        self._layout = layout = attention.layouts[0]
        self._spec = spec = attention.specs[0]
        self._kernels = implementation(model.device, model.dtype)
        self._chunks = [
            slice(a, min(a + CHUNK_TOKENS, last - first)) for a in range(0, last - first, CHUNK_TOKENS)
        ]
        self._positions = torch.arange(first, last)
        self._h = model.embed(torch.tensor(sequence.tokens[first:last]))
        n = last - first
        self._q = torch.empty(n, spec.q_heads, spec.k_dim, dtype=model.dtype)
        # Token by token, as they are computed; `extend` and the stores take heads that lie apart.
        self._projected = (
            torch.empty(n, layout.k_heads, layout.k_dim, dtype=model.dtype),
            torch.empty(n, layout.v_heads, layout.v_dim, dtype=model.dtype),
        )
        self._k, self._v = (x.transpose(0, 1) for x in self._projected)
        self._stored = (self._k, self._v)
        if layout.format.quantised:
            k_bytes, v_bytes = forms.stored_bytes(layout)
            self._stored = (
                torch.empty(layout.k_heads, n, k_bytes, dtype=torch.uint8),
                torch.empty(layout.v_heads, n, v_bytes, dtype=torch.uint8),
            )
        wide = torch.float64 if model.dtype == torch.float64 else torch.float32
        self._past = [
            State.identity(c.stop - c.start, spec.q_heads, spec.v_dim, dtype=wide) for c in self._chunks
        ]
        most = min(n, CHUNK_TOKENS)
        self._states = [State.identity(most, spec.q_heads, spec.v_dim, dtype=wide) for _ in range(2)]
        self._out = State.identity(most, spec.q_heads, spec.v_dim, dtype=model.dtype)
        self._pieces = _pieces(sequence, first)
        self._pulls: dict[int, Future[tuple[Tensor, Tensor]]] = {}
        self._pulled: tuple[Tensor, Tensor] | None = None
        """The piece that is attended to now."""

    @property
    def done_tokens(self) -> int:
        """Prompt tokens done so far, those half way through the layers in part."""
        return self.first + (self.last - self.first) * self.layers_done // self._model.config.layers

    def units(self) -> Iterator[Unit | Future[Any]]:
        """What is to be run, in order; and calls to shards, each of which must have succeeded before what
        comes behind it."""
        layers = self._model.config.layers
        for layer in range(layers):
            for index in range(len(self._chunks)):
                yield partial(self._project, layer, index)
            writes = self._start_writing(layer)
            rows = self._attending(layer)
            for piece in range(len(self._pieces) if rows else 0):
                pull = self._pull(layer, piece)
                yield pull
                self._pulled = pull.result()
                self._pull_next(layer, piece)
                for index, part in rows:
                    yield partial(self._attend, piece, index, part)
            for index, part in rows:
                yield partial(self._finish, layer, index, part)
            yield from writes
            self.layers_done = layer + 1
        if self._logits_of:
            yield self._to_logits

    def close(self) -> None:
        """Cancels the pulls that have not begun. Calls that run go on: they read and fill memory that is
        theirs until they end."""
        for pull in self._pulls.values():
            pull.cancel()
        self._pulls.clear()

    def _attending(self, layer: int) -> list[tuple[int, slice]]:
        """Which rows of which chunks go through attention: behind the last layer's k and v there is nobody
        but the rows that logits are wanted of."""
        last_layer = layer + 1 == self._model.config.layers
        wanted = self.last - self.first - self._logits_of if last_layer else 0
        return [
            (index, slice(max(0, wanted - c.start), c.stop - c.start))
            for index, c in enumerate(self._chunks)
            if c.stop > wanted
        ]

    def _project(self, layer: int, index: int) -> None:
        chunk = self._chunks[index]
        k, v = self._projected
        out = self._q[chunk], k[chunk], v[chunk]
        self._model.project(layer, self._h[chunk], self._positions[chunk], out=out)
        if self._layout.format.quantised:
            # The store is the truth: attend to the values as they are stored.
            stored = forms.to_stored(self._layout, self._k[:, chunk], self._v[:, chunk])
            for to, rows in zip(self._stored, stored, strict=True):
                to[:, chunk] = rows
            whole = forms.from_stored(self._layout, *stored, dtype=self._model.dtype)
            self._k[:, chunk], self._v[:, chunk] = whole

    def _attend(self, piece: int, index: int, part: slice) -> None:
        """One chunk's rows on one piece of the past, which was pulled."""
        assert self._pulled is not None
        where = self._pieces[piece]
        k, v = self._pulled
        group0, group1 = where.span.group0, where.span.group1
        heads = slice(group0 * self._spec.q_heads_per_group, group1 * self._spec.q_heads_per_group)
        past = _of(self._past[index], part, heads)
        row, n = self._chunks[index].start + part.start, part.stop - part.start
        q = self._q[row : row + n, heads]
        if where.first == 0:  # the heads' first piece: there is nothing to merge it with
            self._extend(q, k, v, row, where.first, past)
            return
        new, both = (_of(state, slice(0, n), heads) for state in self._states)
        self._extend(q, k, v, row, where.first, new)
        self._kernels.merge([past, new], out=both)
        if past.o.shape == self._states[1].o.shape:
            self._past[index], self._states[1] = self._states[1], self._past[index]
        else:
            past.o.copy_(both.o)
            past.lse.copy_(both.lse)

    def _finish(self, layer: int, index: int, part: slice) -> None:
        """One chunk's rows on the segment itself, and through the layer's rest."""
        n, heads = part.stop - part.start, slice(0, self._spec.q_heads)
        chunk = self._chunks[index]
        local, out = _of(self._states[0], slice(0, n), heads), _of(self._out, slice(0, n), heads)
        rows = slice(chunk.start + part.start, chunk.start + part.stop)
        q, k, v = self._q[rows], self._k[:, : rows.stop], self._v[:, : rows.stop]
        if self._pieces:
            self._extend(q, k, v, rows.start, self.first, local)
            self._kernels.merge([_of(self._past[index], part, heads), local], out=out)
        else:
            self._extend(q, k, v, rows.start, self.first, out)
        self._model.finish(layer, self._h[rows], out.o, out=self._h[rows])

    def _extend(self, q: Tensor, k: Tensor, v: Tensor, row: int, k_position: int, out: State) -> None:
        self._kernels.extend(
            q,
            k,
            v,
            self._spec,
            q_positions=self._positions[row : row + len(q)],
            k_position=k_position,
            out=out,
            threads=torch.get_num_threads(),
        )

    def _pull(self, layer: int, piece: int) -> Future[tuple[Tensor, Tensor]]:
        """The piece's k and v."""
        at = layer * len(self._pieces) + piece
        return self._pulls.pop(at, None) or self._send_for(at)

    def _pull_next(self, layer: int, piece: int) -> None:
        """The piece behind this one is sent for, to come while this one is attended to."""
        after = layer * len(self._pieces) + piece + 1
        if after < self._model.config.layers * len(self._pieces) and self._attending(
            after // len(self._pieces)
        ):
            self._pulls[after] = self._send_for(after)

    def _send_for(self, at: int) -> Future[tuple[Tensor, Tensor]]:
        layer, piece = divmod(at, len(self._pieces))
        span, first, last = self._pieces[piece]
        return self._pool[span.worker].submit(
            lambda client: client.store.read(
                span.span,
                layer,
                first - span.origin,
                last - span.origin,
                sequence=self.sequence.id,
                dtype=self._model.dtype,
            )
        )

    def _start_writing(self, layer: int) -> list[Future[None]]:
        """This layer's k and v go to their spans."""
        k, v = self._stored
        holder = self.sequence.placed_holder
        calls = []
        for span in self.sequence.spans:
            a, b = max(self.first, span.sealed), min(self.last, span.last)
            if a < b:
                tokens = slice(a - self.first, b - self.first)
                call = partial(
                    spans.write,
                    span=span,
                    layer=layer,
                    position=a,
                    k=k[:, tokens],
                    v=v[:, tokens],
                    layout=self._layout,
                    holder=holder,
                )
                calls.append(self._pool[span.worker].submit(call))
        return calls

    def _to_logits(self) -> None:
        self.logits = self._model.logits(self._h[len(self._h) - self._logits_of :])


def _pieces(sequence: Sequence, until: int) -> list[_Piece]:
    """``[0, until)`` in span order."""
    pieces = []
    for span in sorted(sequence.spans, key=lambda span: (span.first, span.group0)):
        for first in range(span.first, min(span.last, until), PIECE_TOKENS):
            pieces.append(_Piece(span, first, min(first + PIECE_TOKENS, span.last, until)))
    return pieces


def _of(state: State, rows: slice, heads: slice) -> State:
    return State(state.o[rows, heads], state.lse[rows, heads])
