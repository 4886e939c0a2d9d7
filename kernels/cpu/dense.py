"""A decoder layer's slices outside of attention, in native code: launchers with checks over its ``dense_*``.

Called by ``models.native_llama``, whose base class holds the same slices in PyTorch: that is the reference.
Weights lie as PyTorch has them and are shared with it. Must not know how a model is loaded, nor attention.

Floors (B bytes of weights a call reads, n weights, R rows): time >= B / read bandwidth, and
>= 2 n R / float32 FMA rate. Up to some 8 rows the first is the greater one for plain weights. Packed
ones cost 7 cycles per 64 more than their FMAs, about what memory takes to give them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farshore.kernels.cpu import _native
from farshore.kernels.cpu.packed import Packed

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""What weights and rows may be, and their numbers in ``native/plan.h``."""

AWAKE_US = 60
"""How long threads wait awake between a step's calls. Over two attention workers on the same two cores a
layer took 277 us more than alone with 20, 207 with 60, 233 with 200: who is not let in at once waits so
long."""

FEW_ROWS = 32
"""Up to these a call reads the weights as they lie; their number does not change a row's bits."""

MATRIX_UNIT = "amx" in _native.instruction_sets()
"""Whether the CPU multiplies matrices of bfloat16: PyTorch then does many rows at ten times our rate."""

READS_PACKED = "avx512" in _native.instruction_sets()
"""Whether this CPU's kernels expand packed weights: every one with AVX-512, where a table is one register."""


class Linear(NamedTuple):
    """``weight`` [out, in]; ``bias`` [out] or None; ``packed``, the same values in fewer bytes, or None: what
    few rows are multiplied by."""

    weight: Tensor
    bias: Tensor | None
    packed: Packed | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer's weights, checked. Immutable: threads may share one."""

    native: Any
    kept: tuple[object, ...]
    """Alive as long as the native layer, which points into them."""
    dtype: torch.dtype
    hidden: int
    head_dim: int
    q_heads: int
    kv_heads: int


@dataclass(frozen=True, slots=True)
class Head:
    """The last norm and the vocabulary's weights, checked."""

    native: Any
    kept: tuple[object, ...]
    dtype: torch.dtype
    hidden: int
    vocab: int


def layer(
    *,
    attention_norm: Tensor,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    mlp_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
    rotation: tuple[Tensor, Tensor],
    eps: float,
    threads: int,
) -> Layer:
    """``rotation``: (cos, sin), each [positions, head_dim / 2]; norms [hidden]. All in one dtype of DTYPES,
    on the CPU, contiguous. ValueError where shapes do not fit one another.
    """
    cos, sin = rotation
    positions, half = cos.shape
    (q_out, hidden), (kv_out, _), (inner, _) = q.weight.shape, k.weight.shape, gate.weight.shape
    dtype = q.weight.dtype
    _check("norms", (attention_norm, mlp_norm), (hidden,), dtype)
    _check("rotation", rotation, (positions, half), dtype)
    matrices: dict[str, _NativeLinear] = {}
    kept: list[object] = [*rotation, attention_norm, mlp_norm]
    shapes = ((q_out, hidden), (kv_out, hidden), (kv_out, hidden), (hidden, q_out))
    shapes += ((inner, hidden), (inner, hidden), (hidden, inner))
    linears = {"q": q, "k": k, "v": v, "o": o, "gate": gate, "up": up, "down": down}
    for (name, linear), shape in zip(linears.items(), shapes, strict=True):
        matrices[name] = _linear(linear, shape, dtype)
        kept += linear
    if q_out % (2 * half) or kv_out % (2 * half):
        raise ValueError(f"{q_out} and {kv_out} outputs are no whole heads of {2 * half}")
    native = _native.dense_layer(
        threads=threads,
        eps=eps,
        cos=cos,
        sin=sin,
        attention_norm=attention_norm,
        mlp_norm=mlp_norm,
        **matrices,
    )
    return Layer(native, tuple(kept), dtype, hidden, 2 * half, q_out // (2 * half), kv_out // (2 * half))


def head(*, norm: Tensor, vocabulary: Linear, eps: float, threads: int) -> Head:
    """``vocabulary`` [vocab, hidden], ``norm`` [hidden]; as :func:`layer`."""
    vocab, hidden = vocabulary.weight.shape
    dtype = vocabulary.weight.dtype
    _check("norm", (norm,), (hidden,), dtype)
    linear = _linear(vocabulary, (vocab, hidden), dtype)
    native = _native.dense_head(threads=threads, eps=eps, norm=norm, vocabulary=linear)
    return Head(native, (norm, *vocabulary), dtype, hidden, vocab)


def expect_calls() -> None:
    """A step's calls follow each other closely: threads wait for the next one awake, up to ``AWAKE_US``. For
    the whole process."""
    _native.set_spin_us(AWAKE_US)


def attention_input(layer: Layer, h: Tensor) -> Tensor:
    """h [R, hidden] -> its RMS norm, weighted; [R, hidden]."""
    h = _rows(h, layer.hidden, layer.dtype)
    out = torch.empty_like(h)
    if len(h):
        _native.dense_input(layer.native, len(h), h.data_ptr(), out.data_ptr())
    return out


def query(layer: Layer, normed: Tensor, positions: Tensor) -> Tensor:
    """normed [R, hidden], positions i64 [R] -> q [R, q_heads, head_dim], rotated. IndexError for a position
    outside of the rotation table."""
    normed = _rows(normed, layer.hidden, layer.dtype)
    rows = len(normed)
    out = normed.new_empty(rows, layer.q_heads, layer.head_dim)
    if rows:
        at = _positions(positions, rows)
        _native.dense_query(layer.native, rows, normed.data_ptr(), at.data_ptr(), out.data_ptr())
    return out


def key_value(layer: Layer, normed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`query` -> (k rotated, v), each [R, kv_heads, head_dim]."""
    normed = _rows(normed, layer.hidden, layer.dtype)
    rows = len(normed)
    k = normed.new_empty(rows, layer.kv_heads, layer.head_dim)
    v = torch.empty_like(k)
    if rows:
        at = _positions(positions, rows)
        _native.dense_key_value(
            layer.native, rows, normed.data_ptr(), at.data_ptr(), k.data_ptr(), v.data_ptr()
        )
    return k, v


def project(
    layer: Layer, h: Tensor, positions: Tensor, *, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`attention_input`, then :func:`query` and :func:`key_value`, in one call: h -> (q, k, v), in the
    contiguous memory of ``out`` if given."""
    h = _rows(h, layer.hidden, layer.dtype)
    rows = len(h)
    shapes = [(rows, heads, layer.head_dim) for heads in (layer.q_heads, layer.kv_heads, layer.kv_heads)]
    if out is None:
        q, k, v = (h.new_empty(shape) for shape in shapes)
    else:
        q, k, v = out
        for it, shape in zip(out, shapes, strict=True):
            _check("out", (it,), shape, layer.dtype)
    if rows:
        at = _positions(positions, rows)
        pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr())
        _native.dense_project(layer.native, rows, h.data_ptr(), at.data_ptr(), *pointers)
    return q, k, v


def finish(layer: Layer, h: Tensor, o: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The layer's input h [R, hidden] and its attention's output o [R, q_heads, head_dim] -> next h, in the
    contiguous memory of ``out`` if given, which may be h's own."""
    h = _rows(h, layer.hidden, layer.dtype)
    o = _rows(o.flatten(1), layer.q_heads * layer.head_dim, layer.dtype)
    if len(o) != len(h):
        raise ValueError(f"{len(h)} rows of h, {len(o)} of o")
    if out is None:
        out = torch.empty_like(h)
    else:
        _check("out", (out,), h.shape, layer.dtype)
    if len(h):
        _native.dense_finish(layer.native, len(h), h.data_ptr(), o.data_ptr(), out.data_ptr())
    return out


def logits(head: Head, h: Tensor) -> Tensor:
    """h [R, hidden] -> f32 [R, vocab], rounded to the head's dtype."""
    h = _rows(h, head.hidden, head.dtype)
    out = torch.empty(len(h), head.vocab, dtype=torch.float32)
    if len(h):
        _native.dense_logits(head.native, len(h), h.data_ptr(), out.data_ptr())
    return out


class LayerBuffers:
    """The slices of all layers on R rows, in memory that stays where it is: checked once, nothing allocated.

    ``positions`` i64[R]; ``h`` [R, hidden], in front of layer 0 or behind the layer finished last; ``q``
    [R, q_heads, head_dim], ``k`` and ``v`` [R, kv_heads, head_dim], of the layer projected last; ``o`` as
    ``q``, the caller's to fill before :meth:`finish`. Layers are taken in order.
    """

    def __init__(self, layers: Sequence[Layer], rows: int) -> None:
        """R = ``rows``, 1 or more."""
        first = layers[0]
        new = partial(torch.empty, dtype=first.dtype)
        self.positions = torch.zeros(rows, dtype=torch.int64)
        self.q, self.o = (new(rows, first.q_heads, first.head_dim) for _ in range(2))
        self.k, self.v = (new(rows, first.kv_heads, first.head_dim) for _ in range(2))
        self._normed = new(rows, first.hidden)
        # A layer reads the one and writes the other.
        self._h = [new(rows, first.hidden) for _ in range(2)]
        self.h = self._h[0]
        at, normed, q, k, v, o = (
            x.data_ptr() for x in (self.positions, self._normed, self.q, self.k, self.v, self.o)
        )
        ends = [x.data_ptr() for x in self._h]
        turns = [(layer.native, rows, ends[i % 2], ends[(i + 1) % 2]) for i, layer in enumerate(layers)]
        self._project = [(native, n, h, at, q, k, v) for native, n, h, _ in turns]
        self._input = [(native, n, h, normed) for native, n, h, _ in turns]
        self._query = [(native, n, normed, at, q) for native, n, _, _ in turns]
        self._key_value = [(native, n, normed, at, k, v) for native, n, _, _ in turns]
        self._finish = [(native, n, h, o, behind) for native, n, h, behind in turns]

    def enter(self, h: Tensor) -> None:
        """h [R, hidden] goes in front of layer 0."""
        self.h = self._h[0].copy_(h)

    def query(self, layer: int) -> None:
        """As :func:`attention_input` and :func:`query`."""
        _native.dense_input(*self._input[layer])
        _native.dense_query(*self._query[layer])

    def key_value(self, layer: int) -> None:
        """Behind :meth:`query` of the layer."""
        _native.dense_key_value(*self._key_value[layer])

    def project(self, layer: int) -> None:
        _native.dense_project(*self._project[layer])

    def finish(self, layer: int) -> None:
        _native.dense_finish(*self._finish[layer])
        self.h = self._h[(layer + 1) % 2]


def gather(table: Tensor, ids: Tensor) -> Tensor:
    """Rows of ``table`` [n, width] by number, i64 [R]. IndexError for one outside of it."""
    if not (table.is_cpu and table.is_contiguous() and table.dim() == 2):
        raise ValueError(f"a table {tuple(table.shape)} on {table.device}: give contiguous rows on the CPU")
    out = table.new_empty(len(ids), table.shape[1])
    at = _positions(ids, len(ids))
    _native.dense_gather(table, at, out)
    return out


_NativeLinear = tuple[Tensor, Tensor | None, Tensor | None, int]


def _linear(linear: Linear, shape: tuple[int, int], dtype: torch.dtype) -> _NativeLinear:
    """(weight, bias, packed rows, storage) for the native side; packed rows are used for bfloat16 only."""
    weight, bias, packed = linear
    _check("weight", (weight,), shape, dtype)
    if bias is not None:
        _check("bias", (bias,), shape[:1], dtype)
    if packed is None or dtype != torch.bfloat16:
        return weight, bias, None, 0
    packed.check(shape)
    return weight, bias, packed.rows, packed.storage


def _check(what: str, tensors: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"{what} in {dtype}: give float32 or bfloat16")
    for it in tensors:
        if it.shape != shape or it.dtype != dtype or not it.is_cpu or not it.is_contiguous():
            raise ValueError(
                f"{what} {tuple(it.shape)} {it.dtype} on {it.device}: expected {tuple(shape)} {dtype},"
                " contiguous, on the CPU"
            )


def _rows(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    if x.dim() != 2 or x.shape[1] != width or x.dtype != dtype or not x.is_cpu:
        raise ValueError(f"rows {tuple(x.shape)} {x.dtype} on {x.device}: expected [R, {width}] {dtype}")
    return x.contiguous()


def _positions(positions: Tensor, rows: int) -> Tensor:
    if positions.shape != (rows,) or positions.dtype != torch.int64 or not positions.is_cpu:
        raise ValueError(f"{tuple(positions.shape)} {positions.dtype} numbers: expected int64 [{rows}]")
    return positions.contiguous()
