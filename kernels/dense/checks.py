"""The checks of arguments that all implementations of the dense kernels share. Called by them alone."""

from torch import Tensor

from farshore.kernels.dense.base import KVRows, KVSlots, Rotation


def add_norm(h: Tensor, x: Tensor | None, weight: Tensor, out: Tensor) -> None:
    _same(h, *(other for other in (x, weight, out) if other is not None))
    expected = (h.shape, (h.shape[-1],))
    given = (h.shape if x is None else x.shape, weight.shape)
    if h.dim() != 2 or given != expected or out.shape != h.shape:
        raise ValueError(
            f"h {tuple(h.shape)}, x {None if x is None else tuple(x.shape)}, weight {tuple(weight.shape)},"
            f" out {tuple(out.shape)}: give [R, hidden], and [hidden] for the weight"
        )


def silu_multiply(gate_up: Tensor, out: Tensor) -> None:
    _same(gate_up, out)
    if gate_up.dim() != 2 or gate_up.shape != (len(out), 2 * out.shape[-1]):
        raise ValueError(
            f"gate and up {tuple(gate_up.shape)}, out {tuple(out.shape)}: give [R, 2 n] and [R, n]"
        )


def rotate(
    x: Tensor, rotation: Rotation, positions: Tensor, q: Tensor | None, kv: KVRows | KVSlots | None
) -> tuple[int, int]:
    """(query heads, KV heads)."""
    dim = 2 * rotation.cos.shape[1]
    rows = len(x)
    _same(x, *rotation, *(() if q is None else (q,)), *(kv if isinstance(kv, KVRows) else ()))
    q_heads = 0 if q is None else q.shape[1]
    kv_heads = 0
    shapes = [] if q is None else [q.shape]
    if isinstance(kv, KVRows):
        kv_heads = kv.k.shape[1]
        shapes += [kv.k.shape, kv.v.shape]
        if kv.k.shape != kv.v.shape:
            raise ValueError(f"k {tuple(kv.k.shape)}, v {tuple(kv.v.shape)}: give equal heads")
    elif kv is not None:
        kv_heads = kv.layout.k_heads
        _check_slots(kv, x, dim)
    wrong = [tuple(shape) for shape in shapes if (shape[0], shape[2]) != (rows, dim)]
    if wrong or x.shape != (rows, (q_heads + 2 * kv_heads) * dim) or positions.shape != (rows,):
        raise ValueError(
            f"x {tuple(x.shape)} of {q_heads} query and {kv_heads} KV heads, {positions.numel()} positions,"
            f" outputs {wrong or 'as expected'}: not of {rows} rows and heads of {dim}"
        )
    return q_heads, kv_heads


def _check_slots(slots: KVSlots, x: Tensor, dim: int) -> None:
    layout = slots.layout
    if layout.v_in_k or (layout.k_dim, layout.v_dim, layout.v_heads) != (dim, dim, layout.k_heads):
        raise ValueError(f"blocks of {layout}: give K and V of equal heads of {dim}")
    if not layout.format.quantised and layout.format.dtype != x.dtype:
        raise ValueError(f"rows of {x.dtype} for blocks in {layout.format.value}")
    if not 0 <= slots.layer < layout.layers:
        raise ValueError(f"layer {slots.layer} of {layout.layers}")
    for field in (slots.base, slots.slot, slots.source):
        if field.shape != (len(x),) or field.device != x.device:
            raise ValueError(f"places {tuple(field.shape)} on {field.device} for {len(x)} rows on {x.device}")


def _same(first: Tensor, *others: Tensor) -> None:
    for other in others:
        if (other.dtype, other.device) != (first.dtype, first.device):
            raise ValueError(
                f"{other.dtype} on {other.device} beside {first.dtype} on {first.device}: give one of each"
            )
