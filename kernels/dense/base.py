"""The contract of the dense kernels: what a decoder layer on a device computes between its matrix products.

An implementation is a module with these functions: :mod:`.reference` in PyTorch, and
:mod:`farshore.kernels.gpu.dense.ops` in Triton; :mod:`farshore.kernels.select` chooses it. Called by
``models.device_llama``. It must not know layers' weights, sequences or the store.

Rounding is that of transformers in the model's dtype: every operation that PyTorch would launch by itself
rounds its result. All tensors of a call lie on one device and have one dtype, except where it says otherwise.
Functions write to tensors that they are given, allocate nothing that outlives the call, and raise ValueError
for shapes and dtypes that do not fit.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from farshore.kernels.base import KVLayout


class Rotation(NamedTuple):
    """The angles of every position, [positions, head_dim / 2] each."""

    cos: Tensor
    sin: Tensor


class KVRows(NamedTuple):
    """Keys and values of R rows, [R, kv_heads, head_dim] each; the elements of a head are adjacent."""

    k: Tensor
    v: Tensor


class KVSlots(NamedTuple):
    """The places of R rows of one layer in blocks of stored KV: each row has a slot of a block."""

    memory: Tensor
    """u8[bytes]"""
    layout: KVLayout
    """That of the blocks; V must not lie in K."""
    layer: int
    base: Tensor
    """i64[R]: byte offset of the row's block in the memory ..."""
    slot: Tensor
    """i64[R]: ... and the slot in it."""
    source: Tensor
    """i64[R]: the row itself. A row that names another one is not stored; it must name that row's place."""


class DenseKernels(Protocol):
    """The functions of one implementation. Thread-safe. R may be 0."""

    def add_norm(self, h: Tensor, x: Tensor | None, weight: Tensor, eps: float, *, out: Tensor) -> None:
        """Adds x to h, in place, unless it is None; then writes h divided by its root mean square, times
        ``weight``. h, x and out: [R, hidden]; weight: [hidden]. The division is in float32 and rounded once,
        before the weight."""

    def rotate(
        self,
        x: Tensor,
        rotation: Rotation,
        positions: Tensor,
        *,
        q: Tensor | None = None,
        kv: KVRows | KVSlots | None = None,
    ) -> None:
        """Rotates the heads of q and K by the angles of the rows' positions, i64[R]; copies those of V.

        x: [R, heads * head_dim], of q's heads, then K's, then V's; those without a target are absent. q:
        [R, q_heads, head_dim]. Elements i and i + head_dim / 2 of a head are a pair. KVSlots of a quantised
        format get what :func:`farshore.kernels.formats.quantise` makes of the rotated rows; others must have
        x's dtype. A position outside of the table is undefined on a GPU.
        """

    def silu_multiply(self, gate_up: Tensor, *, out: Tensor) -> None:
        """Writes silu(gate) * up. gate_up: [R, 2 * inner], gate first; out: [R, inner]."""
