"""What ``partial`` and ``extend`` share on the device: the sweep of a tile of query rows over keys.

A tile is M = rows x heads queries that share one K head and one V head (M packs whole rows: m = row * heads
+ head), so grouped-query attention feeds the matrix units instead of reading K once per head. Softmax runs
online in base 2, where the hardware's exponential is; only the final lse is natural.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SCALE_GROUP = tl.constexpr(64)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def multiply(a, b, total):
    """total + a @ b with float32 accumulation. Float32 operands are multiplied in full, never as TF32."""
    if INTERPRETED:
        # numpy has no bfloat16; products of bfloat16 are exact in float32, as they are on tensor cores.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def tanh(x):
    """Accurate near 0 too, where the exponential form cancels."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = x * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def load_rows(
    memory, scales, at, scale_at, keep,
    FIRST: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr,
    SCALES: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """DTYPE[tokens, BLOCK]: dims FIRST .. FIRST + BLOCK of stored rows, 0 where masked or beyond DIM.

    int8 rows are dequantised here with their SCALES bfloat16 scales (0: not quantised), one per 64 dims; the
    product is rounded to DTYPE once, no more than storing it as DTYPE would have done.
    """
    dims = FIRST + tl.arange(0, BLOCK)
    place = memory + at[:, None] + dims[None, :]
    if FIRST + BLOCK > DIM:
        x = tl.load(place, mask=keep[:, None] & (dims < DIM)[None, :], other=0)
    elif MASKED:
        x = tl.load(place, mask=keep[:, None], other=0)
    else:
        x = tl.load(place)
    if SCALES > 0:
        GROUPS: tl.constexpr = (BLOCK + SCALE_GROUP - 1) // SCALE_GROUP
        group = FIRST // SCALE_GROUP + tl.arange(0, GROUPS)
        known = keep[:, None]
        if FIRST // SCALE_GROUP + GROUPS > SCALES:
            known = known & (group < SCALES)[None, :]
        scale = tl.load(scales + scale_at[:, None] + group[None, :], mask=known, other=0)
        wide = tl.reshape(x.to(tl.float32), (at.shape[0], GROUPS, BLOCK // GROUPS))
        x = tl.reshape(wide * scale.to(tl.float32)[:, :, None], (at.shape[0], BLOCK))
    return x.to(DTYPE)


@triton.jit
def load_queries(
    q, at, keep, FIRST: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, DTYPE: tl.constexpr
):
    """DTYPE[M, BLOCK]: dims FIRST .. FIRST + BLOCK of the queries at element offsets ``at``."""
    dims = FIRST + tl.arange(0, BLOCK)
    return tl.load(q + at[:, None] + dims[None, :], mask=keep[:, None] & (dims < DIM)[None, :], other=0.0).to(
        DTYPE
    )


@triton.jit
def sweep(
    queries, queries_rest, positions, peak, mass, total,
    k, v, k_scales, v_scales, k_token, v_token, block_stride, first, k_position, start, stop, scale,
    K_DIM: tl.constexpr, K_MAIN: tl.constexpr, K_REST: tl.constexpr,
    V_DIM: tl.constexpr, V_BLOCK: tl.constexpr,
    K_SCALES: tl.constexpr, V_SCALES: tl.constexpr, V_IS_KEYS: tl.constexpr,
    SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Let the queries see keys ``start .. stop``; returns the online softmax's (peak, mass, total).

    queries ``[M, K_MAIN]`` and queries_rest ``[M, K_REST]``: the K dims in two parts, a power of two and what
    is left (96 = 64 + 32), so that few lanes are padding. k, v: pointers to the head's first stored row;
    tokens lie k_token, v_token elements apart, and every BLOCK_TOKENS of them the next block begins
    block_stride elements after the last (None: one contiguous stretch). Not MASKED: every query sees every
    key, whole tiles only. V_IS_KEYS: the first V_BLOCK = K_MAIN elements of a key are its value (MLA), so it
    is loaded once.
    """
    for tile in range(start, stop, BLOCK_N):
        token = tile + tl.arange(0, BLOCK_N)
        inside = token < stop
        slot = first + token
        if BLOCK_TOKENS is None:
            k_at = slot.to(tl.int64) * k_token
            v_at = slot.to(tl.int64) * v_token
            block_at = tl.zeros_like(k_at)
        else:
            block_at = (slot // BLOCK_TOKENS).to(tl.int64) * block_stride
            slot = slot % BLOCK_TOKENS
            k_at = block_at + slot * k_token
            v_at = block_at + slot * v_token
        # Strides are in stored elements, one byte each where there are scales, and a scale has two bytes.
        k_scale_at = block_at // 2 + slot * K_SCALES
        v_scale_at = block_at // 2 + slot * V_SCALES

        keys = load_rows(
            k, k_scales, k_at, k_scale_at, inside, 0, K_MAIN, K_DIM, K_SCALES, MASKED, queries.dtype
        )
        logits = multiply(queries, tl.trans(keys), tl.zeros((queries.shape[0], BLOCK_N), tl.float32))
        if K_REST > 0:
            rest = load_rows(
                k, k_scales, k_at, k_scale_at, inside, K_MAIN, K_REST, K_DIM, K_SCALES, MASKED, queries.dtype
            )
            logits = multiply(queries_rest, tl.trans(rest), logits)
        if SOFT_CAP is None:
            logits *= scale * LOG2_E
        else:
            logits = tanh(logits * (scale / SOFT_CAP)) * (SOFT_CAP * LOG2_E)
        if MASKED:
            distance = positions[:, None] - (k_position + token)[None, :]
            seen = inside[None, :] & (distance >= 0)
            if WINDOW is not None:
                seen = seen & (distance < WINDOW)
            logits = tl.where(seen, logits, float("-inf"))

        new_peak = tl.maximum(peak, tl.max(logits, axis=1))
        # A row that has seen nothing yet has peak -inf; subtracting it from itself would give NaN.
        floor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(logits - floor[:, None])
        fade = tl.exp2(peak - floor)
        mass = mass * fade + tl.sum(weights, axis=1)
        if V_IS_KEYS:
            values = keys
        else:
            values = load_rows(
                v, v_scales, v_at, v_scale_at, inside, 0, V_BLOCK, V_DIM, V_SCALES, MASKED, queries.dtype
            )
        total = multiply(weights.to(queries.dtype), values, total * fade[:, None])
        peak = new_peak
    return peak, mass, total


@triton.jit
def finish(peak, mass, total):
    """(o ``[M, V_BLOCK]``, natural lse ``[M]``) of the online softmax; (0, -inf) of rows that saw nothing."""
    some = mass > 0
    o = tl.where(some[:, None], total / tl.where(some, mass, 1.0)[:, None], 0.0)
    lse = tl.where(some, (peak + tl.log2(tl.where(some, mass, 1.0))) * LN_2, float("-inf"))
    return o, lse
