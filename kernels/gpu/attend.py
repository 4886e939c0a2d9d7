"""Device functions of the ``partial`` and ``extend`` kernels: attention of a tile of queries over keys.

A tile is M = rows x heads queries that share one K head and one V head, in whole rows (m = row * heads +
head), so that grouped-query attention fills the matrix units instead of reading K once per head. The softmax
is online and in base 2, because the hardware's exponential is; only the final lse is natural.

**Softmax sums** of M queries over the keys read so far: row_max ``[M]``, the greatest logit; row_sum ``[M]``,
the sum of the weights 2^(logit - row_max); acc ``[M, V_BLOCK]``, the sum of V by weight. All are float32.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SCALE_GROUP = tl.constexpr(64)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def multiply(a, b, acc):
    """acc + a @ b, accumulated in float32. Float32 operands are multiplied in full, never as TF32."""
    if INTERPRETED:
        # numpy has no bfloat16; products of bfloat16 are exact in float32, as they are on tensor cores.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def tanh(x):
    """tanh(x). Near 0, where the exponential form cancels, it is a polynomial."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = x * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def nibbles(dims, FIRST: tl.constexpr, BLOCK: tl.constexpr, ROW_DIM: tl.constexpr):
    """(byte in the row, bits below it in that byte) of elements ``dims`` = FIRST .. FIRST + BLOCK of an int4
    row of ROW_DIM elements; see :mod:`farshore.kernels.formats`."""
    LAST: tl.constexpr = ROW_DIM // SCALE_GROUP * SCALE_GROUP
    HALF: tl.constexpr = SCALE_GROUP // 2
    if FIRST + BLOCK <= LAST:
        # Whole groups only. In this form the compiler sees that 32 bytes are adjacent: it loads 16 at a time.
        byte = dims % HALF
        shift = dims // HALF % 2 * 4
    else:
        of_group = dims % SCALE_GROUP
        half = tl.where(dims < LAST, HALF, (ROW_DIM - LAST + 1) // 2)
        byte = tl.where(of_group < half, of_group, of_group - half)
        shift = tl.where(of_group < half, 0, 4)
    return dims // SCALE_GROUP * HALF + byte, shift.to(tl.uint8)


@triton.jit
def load_rows(
    memory, scales, at, scale_at, keep,
    FIRST: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, ROW_DIM: tl.constexpr,
    SCALES: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """DTYPE[tokens, BLOCK]: dims FIRST .. FIRST + BLOCK of the stored rows at element offsets ``at``; 0 where
    ``keep`` is false or beyond DIM. The rows have ROW_DIM dims. Not MASKED: ``keep`` is true everywhere.

    Rows with SCALES > 0 are int8, or int4 if ``memory`` is unsigned, and are dequantised with that many
    bfloat16 scales, at element offsets ``scale_at``, one per 64 dims. The product is rounded to DTYPE once,
    as if it had been stored as DTYPE. The two elements of an int4 byte are loaded from it twice: the second
    time from L1, which moves as many bytes as for int8, and HBM half of them.
    """
    PACKED: tl.constexpr = memory.dtype.element_ty == tl.uint8
    ZERO: tl.constexpr = 0x88 if PACKED else 0
    dims = FIRST + tl.arange(0, BLOCK)
    if PACKED:
        byte, shift = nibbles(dims, FIRST, BLOCK, ROW_DIM)
    else:
        byte = dims
    addresses = memory + at[:, None] + byte[None, :]
    if FIRST + BLOCK > DIM:
        x = tl.load(addresses, mask=keep[:, None] & (dims < DIM)[None, :], other=ZERO)
    elif MASKED:
        x = tl.load(addresses, mask=keep[:, None], other=ZERO)
    else:
        x = tl.load(addresses)
    if PACKED:
        x = (x >> shift[None, :] & 15).to(tl.int8) - 8
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
def no_keys(M: tl.constexpr, V_BLOCK: tl.constexpr):
    """The softmax sums (row_max, row_sum, acc) of M queries over no keys."""
    return (
        tl.full((M,), float("-inf"), tl.float32),
        tl.zeros((M,), tl.float32),
        tl.zeros((M, V_BLOCK), tl.float32),
    )


@triton.jit
def attend_to_keys(
    queries, queries_rest, positions, row_max, row_sum, acc,
    k, v, k_scales, v_scales, k_token, v_token, block_stride, first, k_position, start, stop, scale,
    K_DIM: tl.constexpr, K_MAIN: tl.constexpr, K_REST: tl.constexpr,
    V_DIM: tl.constexpr, V_BLOCK: tl.constexpr, V_ROW_DIM: tl.constexpr,
    K_SCALES: tl.constexpr, V_SCALES: tl.constexpr, V_IS_KEYS: tl.constexpr,
    SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds keys ``start .. stop`` to the queries' softmax sums; returns (row_max, row_sum, acc).

    queries ``[M, K_MAIN]`` and queries_rest ``[M, K_REST]`` hold the K dims in two pieces, a power of two and
    the rest (96 = 64 + 32), so that little is padding. k and v point to the head's first stored row. Tokens
    lie k_token and v_token elements apart; a block holds BLOCK_TOKENS of them, and the next block begins
    block_stride elements later (None: all tokens are adjacent). A stored row of V has V_ROW_DIM dims. Not
    MASKED: every query sees every key, and stop - start is a multiple of BLOCK_N. V_IS_KEYS: the first
    V_BLOCK = K_MAIN elements of a key are its value (MLA), which is loaded once.
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
        # With scales a stored element has one byte, so block_at is in bytes; a scale has two.
        k_scale_at = block_at // 2 + slot * K_SCALES
        v_scale_at = block_at // 2 + slot * V_SCALES

        keys = load_rows(
            k, k_scales, k_at, k_scale_at, inside, 0, K_MAIN, K_DIM, K_DIM, K_SCALES, MASKED, queries.dtype
        )
        logits = multiply(queries, tl.trans(keys), tl.zeros((queries.shape[0], BLOCK_N), tl.float32))
        if K_REST > 0:
            rest = load_rows(
                k, k_scales, k_at, k_scale_at, inside,
                K_MAIN, K_REST, K_DIM, K_DIM, K_SCALES, MASKED, queries.dtype,
            )  # fmt: skip
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

        new_max = tl.maximum(row_max, tl.max(logits, axis=1))
        # A row that has seen no key has row_max -inf; subtracting it from itself would give NaN.
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(logits - base[:, None])
        rescale = tl.exp2(row_max - base)
        row_sum = row_sum * rescale + tl.sum(weights, axis=1)
        if V_IS_KEYS:
            values = keys
        else:
            values = load_rows(
                v, v_scales, v_at, v_scale_at, inside,
                0, V_BLOCK, V_DIM, V_ROW_DIM, V_SCALES, MASKED, queries.dtype,
            )  # fmt: skip
        acc = multiply(weights.to(queries.dtype), values, acc * rescale[:, None])
        row_max = new_max
    return row_max, row_sum, acc


@triton.jit
def normalise(row_max, row_sum, acc):
    """The state (o ``[M, V_BLOCK]``, natural lse ``[M]``) of base-2 softmax sums; (0, -inf) for rows that saw
    no key."""
    seen = row_sum > 0
    divisor = tl.where(seen, row_sum, 1.0)
    o = tl.where(seen[:, None], acc / divisor[:, None], 0.0)
    lse = tl.where(seen, (row_max + tl.log2(divisor)) * LN_2, float("-inf"))
    return o, lse
