"""The native slices of a decoder layer, except attention: checks the arguments, then calls the C++ code.

Called by ``models.native_llama``, whose base class has the same slices in PyTorch; tests compare the two.
Weights are PyTorch's own tensors or packed matrices, without a copy. Must not know how a model is loaded, nor
attention.

Functions raise ValueError for a wrong shape, dtype or device, IndexError for a position or id out of range.

Lower bounds of the time (B bytes of weights that a call reads, n weights, R rows): B / read bandwidth and
2 n R / float32 FMA rate. For plain weights the first is the greater one up to about 8 rows. 64 packed weights
take 7 cycles more than their FMAs, about as long as memory takes to deliver them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farshore.kernels.cpu.native_module import native as _native
from farshore.kernels.cpu.packed import Packed
from farshore.kernels.host import HOST, address

DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes of weights and rows."""

SPIN_US = 60
"""How long pool threads spin between a step's calls before they sleep. With two attention workers on the same
two cores a layer took 277 us longer than alone with 20, 207 with 60 and 233 with 200, because a thread that
finds no free core waits as long as another one spins."""

FEW_ROWS = 32
"""Up to this number of rows, a call reads the weights as they are stored. The number of rows does not change
the bits of a row's result."""

MATRIX_UNIT = "amx" in _native.instruction_sets()
"""Whether the CPU multiplies bfloat16 matrices. If so, PyTorch is ten times as fast with many rows."""


class Linear(NamedTuple):
    """The weights of one linear map."""

    matrix: Tensor | Packed
    """[out, in]; packed only beside tensors in bfloat16."""
    bias: Tensor | None = None
    """[out]"""


@dataclass(frozen=True, slots=True)
class Layer:
    """The checked weights of a decoder layer. Immutable; threads may share it."""

    native: Any
    kept: tuple[object, ...]
    """Tensors that the native layer points into, kept alive."""
    dtype: torch.dtype
    hidden: int
    head_dim: int
    q_heads: int
    kv_heads: int


@dataclass(frozen=True, slots=True)
class LMHead:
    """The checked weights of the last norm and of the vocabulary."""

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
    """Checks the weights of a decoder layer.

    Norms are [hidden]; ``rotation`` is (cos, sin), each [positions, head_dim / 2]. All are in one dtype of
    DTYPES, on the CPU and contiguous. Calls of the layer use ``threads`` threads. Raises ValueError for
    shapes that do not fit one another.
    """
    cos, sin = rotation
    positions, half = cos.shape
    (q_out, hidden), (kv_out, _), (inner, _) = q.matrix.shape, k.matrix.shape, gate.matrix.shape
    dtype = attention_norm.dtype
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


def lm_head(*, norm: Tensor, vocabulary: Linear, eps: float, threads: int) -> LMHead:
    """Checks the weights ``norm`` [hidden] and ``vocabulary`` [vocab, hidden], as :func:`layer` does."""
    vocab, hidden = vocabulary.matrix.shape
    dtype = norm.dtype
    _check("norm", (norm,), (hidden,), dtype)
    linear = _linear(vocabulary, (vocab, hidden), dtype)
    native = _native.dense_head(threads=threads, eps=eps, norm=norm, vocabulary=linear)
    return LMHead(native, (norm, *vocabulary), dtype, hidden, vocab)


def expect_calls() -> None:
    """Makes the process's pool threads spin up to ``SPIN_US`` for the next call, because a step's calls
    follow each other closely. Lasts until the process sets another time."""
    _native.set_spin_us(SPIN_US)


def attention_input(layer: Layer, h: Tensor) -> Tensor:
    """The weighted RMS norm of h [R, hidden]: [R, hidden]."""
    h = _checked_rows(h, layer.hidden, layer.dtype)
    out = torch.empty_like(h)
    if len(h):
        _native.dense_input(layer.native, len(h), address(h), address(out))
    return out


def query(layer: Layer, normed: Tensor, positions: Tensor) -> Tensor:
    """q [R, q_heads, head_dim], rotated, of normed [R, hidden] at positions i64[R]. Raises IndexError for a
    position outside the rotation table."""
    normed = _checked_rows(normed, layer.hidden, layer.dtype)
    rows = len(normed)
    out = normed.new_empty(rows, layer.q_heads, layer.head_dim)
    if rows:
        positions = _checked_numbers(positions, rows)
        _native.dense_query(layer.native, rows, address(normed), address(positions), address(out))
    return out


def key_value(layer: Layer, normed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(k, rotated, and v), each [R, kv_heads, head_dim], of normed [R, hidden] at positions i64[R]."""
    normed = _checked_rows(normed, layer.hidden, layer.dtype)
    rows = len(normed)
    k = normed.new_empty(rows, layer.kv_heads, layer.head_dim)
    v = torch.empty_like(k)
    if rows:
        positions = _checked_numbers(positions, rows)
        _native.dense_key_value(
            layer.native, rows, address(normed), address(positions), address(k), address(v)
        )
    return k, v


def project(
    layer: Layer, h: Tensor, positions: Tensor, *, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v) of h [R, hidden]: :func:`attention_input`, :func:`query` and :func:`key_value` in one call.
    Written to ``out``, which must be contiguous, if given."""
    h = _checked_rows(h, layer.hidden, layer.dtype)
    rows = len(h)
    shapes = [(rows, heads, layer.head_dim) for heads in (layer.q_heads, layer.kv_heads, layer.kv_heads)]
    if out is None:
        q, k, v = (h.new_empty(shape) for shape in shapes)
    else:
        q, k, v = out
        for tensor, shape in zip(out, shapes, strict=True):
            _check("out", (tensor,), shape, layer.dtype)
    if rows:
        positions = _checked_numbers(positions, rows)
        pointers = (address(q), address(k), address(v))
        _native.dense_project(layer.native, rows, address(h), address(positions), *pointers)
    return q, k, v


def finish(layer: Layer, h: Tensor, o: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The layer's output [R, hidden], from its input h [R, hidden] and the attention's o [R, q_heads,
    head_dim]. Written to ``out``, which must be contiguous and may be h, if given."""
    h = _checked_rows(h, layer.hidden, layer.dtype)
    o = _checked_rows(o.flatten(1), layer.q_heads * layer.head_dim, layer.dtype)
    if len(o) != len(h):
        raise ValueError(f"{len(h)} rows of h, {len(o)} of o")
    if out is None:
        out = torch.empty_like(h)
    else:
        _check("out", (out,), h.shape, layer.dtype)
    if len(h):
        _native.dense_finish(layer.native, len(h), address(h), address(o), address(out))
    return out


def logits(head: LMHead, h: Tensor) -> Tensor:
    """Logits f32[R, vocab] of h [R, hidden], rounded to the weights' dtype."""
    h = _checked_rows(h, head.hidden, head.dtype)
    out = torch.empty(len(h), head.vocab, dtype=torch.float32, device=HOST)
    if len(h):
        _native.dense_logits(head.native, len(h), address(h), address(out))
    return out


class LayerBuffers:
    """The slices of all layers on R rows, in memory allocated once: calls check and allocate nothing.

    ``positions`` i64[R] is the caller's to fill. ``h`` [R, hidden] is the input of layer 0 or the output of
    the layer finished last. ``q`` [R, q_heads, head_dim] and ``k``, ``v`` [R, kv_heads, head_dim] are those
    of the layer projected last. ``o``, shaped as ``q``, is the caller's to fill before :meth:`finish`. The
    caller takes the layers in order. Not thread-safe.
    """

    def __init__(self, layers: Sequence[Layer], rows: int) -> None:
        """R = ``rows``, 1 or more."""
        first = layers[0]
        new = partial(torch.empty, dtype=first.dtype, device=HOST)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=HOST)
        self.q, self.o = (new(rows, first.q_heads, first.head_dim) for _ in range(2))
        self.k, self.v = (new(rows, first.kv_heads, first.head_dim) for _ in range(2))
        self._normed = new(rows, first.hidden)
        # A layer reads one buffer and writes the other.
        self._h = [new(rows, first.hidden) for _ in range(2)]
        self.h = self._h[0]
        positions, normed, q, k, v, o = (
            address(x) for x in (self.positions, self._normed, self.q, self.k, self.v, self.o)
        )
        # The arguments of each layer's native calls.
        h = [address(x) for x in self._h]
        calls = [(layer.native, h[i % 2], h[(i + 1) % 2]) for i, layer in enumerate(layers)]
        self._project = [(native, rows, before, positions, q, k, v) for native, before, _ in calls]
        self._input = [(native, rows, before, normed) for native, before, _ in calls]
        self._query = [(native, rows, normed, positions, q) for native, _, _ in calls]
        self._key_value = [(native, rows, normed, positions, k, v) for native, _, _ in calls]
        self._finish = [(native, rows, before, o, after) for native, before, after in calls]

    def enter(self, h: Tensor) -> None:
        """Copies h [R, hidden] in as the input of layer 0."""
        self.h = self._h[0].copy_(h)

    def query(self, layer: int) -> None:
        """Computes ``q``: :func:`attention_input` and :func:`query`."""
        _native.dense_input(*self._input[layer])
        _native.dense_query(*self._query[layer])

    def key_value(self, layer: int) -> None:
        """Computes ``k`` and ``v``. Called after :meth:`query` of the same layer."""
        _native.dense_key_value(*self._key_value[layer])

    def project(self, layer: int) -> None:
        """Computes ``q``, ``k`` and ``v``."""
        _native.dense_project(*self._project[layer])

    def finish(self, layer: int) -> None:
        """Computes the layer's output from ``o``, and puts it into ``h``."""
        _native.dense_finish(*self._finish[layer])
        self.h = self._h[(layer + 1) % 2]


def gather(table: Tensor | Packed, ids: Tensor) -> Tensor:
    """The rows of ``table`` [n, width] with numbers ``ids`` i64[R]: [R, width]. Raises IndexError for an id
    that is not in 0 .. n."""
    ids = _checked_numbers(ids, len(ids))
    if not isinstance(table, Tensor):
        return table.gather(ids)
    if not (table.is_cpu and table.is_contiguous() and table.dim() == 2):
        raise ValueError(f"a table {tuple(table.shape)} on {table.device}: give contiguous rows on the CPU")
    out = table.new_empty(len(ids), table.shape[1])
    _native.dense_gather(table, ids, out)
    return out


_NativeLinear = tuple[int, int, int, Tensor, Tensor | None]


def _linear(linear: Linear, shape: tuple[int, int], dtype: torch.dtype) -> _NativeLinear:
    """(storage, out, in, rows, bias) for the native side."""
    matrix, bias = linear
    if bias is not None:
        _check("bias", (bias,), shape[:1], dtype)
    if isinstance(matrix, Tensor):
        _check("weight", (matrix,), shape, dtype)
        return 0, *shape, matrix, bias
    if dtype != torch.bfloat16:
        raise ValueError(f"packed weights beside {dtype}: give bfloat16")
    matrix.check(shape)
    return matrix.storage, *shape, matrix.rows, bias


def _check(name: str, tensors: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"{name} in {dtype}: give float32 or bfloat16")
    for tensor in tensors:
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous():
            raise ValueError(
                f"{name} {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}:"
                f" expected {tuple(shape)} {dtype}, contiguous, on the CPU"
            )


def _checked_rows(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    if x.dim() != 2 or x.shape[1] != width or x.dtype != dtype or not x.is_cpu:
        raise ValueError(f"rows {tuple(x.shape)} {x.dtype} on {x.device}: expected [R, {width}] {dtype}")
    return x.contiguous()


def _checked_numbers(numbers: Tensor, rows: int) -> Tensor:
    if numbers.shape != (rows,) or numbers.dtype != torch.int64 or not numbers.is_cpu:
        raise ValueError(f"{tuple(numbers.shape)} {numbers.dtype} numbers: expected int64 [{rows}]")
    return numbers.contiguous()
