"""Shared by the kernels' tests: implementations, textbook attention in float64, and KV stored in blocks.

Most fixtures return functions or strategies and have session scope, so that hypothesis can use them.
"""

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from farshore.kernels import reference
from farshore.kernels.base import AttentionSpec, Kernels, KVLayout, Segments, State, WorkList
from farshore.kernels.formats import KVFormat, dequantise, quantise

try:
    from farshore.kernels.cpu import attention as cpu
except ImportError:
    cpu = None

INSTRUCTION_SETS = cpu.instruction_sets if cpu else []
BFLOAT16_PRODUCTS = ("amx", "avx512-bf16")
SIXTEEN_BIT_PRODUCTS = ("avx512", "avx2")
"""These, and BFLOAT16_PRODUCTS, multiply a bfloat16 q of few queries with quantised KV as 16-bit integers."""
# Used by test_sanitised, where every example is slow.
settings.register_profile("few", max_examples=20, derandomize=True)
_ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


class Implementation(NamedTuple):
    """An implementation that runs on the CPU: the reference, or native kernels of one instruction set."""

    name: str
    native: bool
    plan: Callable
    partial: Callable
    extend: Callable
    merge: Callable
    q_dtypes: tuple[torch.dtype, ...]
    formats: tuple[KVFormat, ...]

    def tolerance(self, q_dtype: torch.dtype, stored: KVFormat) -> float:
        """The error of the arithmetic alone, because the textbook reads the same q, K and V."""
        if q_dtype == torch.float64:
            return 1e-12
        # Products of a bfloat16 q with bfloat16 or quantised KV are not float32.
        exact = (torch.float32, torch.float16)
        if self.name in SIXTEEN_BIT_PRODUCTS and stored.quantised and q_dtype not in exact:
            return 1e-3
        if self.name not in BFLOAT16_PRODUCTS or q_dtype in exact:
            return 2e-6
        return 2e-6 if stored in (KVFormat.FLOAT32, KVFormat.FLOAT16) else 8e-3


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="package", autouse=True)
def one_torch_thread():
    """The tests' tensors are small, and on busy cores PyTorch's threads would wait 10 ms for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=["reference", *INSTRUCTION_SETS])
def kernels(request):
    """Each implementation in turn."""
    module = reference if request.param == "reference" else cpu
    functions = (module.native, module.plan, module.partial, module.extend, module.merge)
    if module is reference:
        yield Implementation("reference", *functions, (torch.float64, *_FLOATS), tuple(KVFormat))
        return
    cpu._native.use(request.param)
    formats = tuple(format for format in KVFormat if format is not KVFormat.FLOAT64)
    yield Implementation(request.param, *functions, _FLOATS, formats)
    cpu._native.use(INSTRUCTION_SETS[0])


@pytest.fixture(scope="session")
def assert_protocol():
    """assert_protocol(module, *, native): the module's functions have the signatures of ``Kernels``."""

    def parameters(function):
        listed = inspect.signature(function).parameters.values()
        return [(each.name, each.kind, each.default) for each in listed if each.name != "self"]

    def check(module, *, native: bool) -> None:
        assert module.native is native
        for name in ("plan", "partial", "partial_async", "wait", "extend", "merge"):
            assert parameters(getattr(module, name)) == parameters(getattr(Kernels, name))

    return check


@pytest.fixture(scope="session")
def specs():
    """A strategy: 1 to 3 groups of few or many heads; dims may be multiples of vectors and scale groups."""
    dims = [(64, 64), (128, 128), (80, 96), (96, 80), (112, 20), (192, 128), (256, 64)]
    odd = [(8, 12), (20, 8), (12, 64), (64, 65), (97, 80), (1, 3)]
    inside = [(80, 64), (20, 20), (576, 512)]

    @st.composite
    def draw_spec(draw):
        groups, (ks, vs) = (
            draw(st.integers(1, 3)),
            draw(st.sampled_from([(1, 1), (1, 1), (1, 2), (2, 1), (2, 3)])),
        )
        share = draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
        v_in_k = ks == vs and draw(st.integers(0, 4)) == 0
        k_dim, v_dim = draw(
            st.sampled_from(inside) if v_in_k else st.sampled_from(dims) | st.sampled_from(odd)
        )
        return AttentionSpec(
            q_heads=groups * max(ks * vs, share // (ks * vs) * ks * vs),
            k_heads=groups * ks,
            v_heads=groups * vs,
            k_dim=k_dim,
            v_dim=v_dim,
            scale=k_dim**-0.5,
            soft_cap=draw(st.sampled_from([None, None, 5.0])),
            window_tokens=draw(st.none() | st.integers(1, 90)),
            v_in_k=v_in_k,
        )

    return draw_spec()


class Textbook(NamedTuple):
    o: Tensor
    """f64[R, q_heads, v_dim]"""
    lse: Tensor
    """f64[R, q_heads]"""
    largest_logit: float
    largest_v: float


class StoredTokens(NamedTuple):
    layout: KVLayout
    memory: Tensor
    """u8; where no token was written, all bytes are 0xFF, which is NaN in every float format and scale"""
    stride: int
    k: Tensor
    """f64[k_heads, tokens, k_dim]: the stored values, dequantised"""
    v: Tensor
    """f64[v_heads, tokens, v_dim]"""


@pytest.fixture(scope="session")
def textbook():
    """textbook(q, k, v, spec, *, q_positions, k_position=0) -> Textbook, computed one query at a time."""

    def attend(q, k, v, spec, *, q_positions, k_position=0):
        q, k, v = q.double(), k.double(), v.double()
        o, lse = State.identity(*q.shape[:2], spec.v_dim, dtype=torch.float64, device="cpu")
        largest = 0.0
        for row in range(q.shape[0]):
            distance = int(q_positions[row]) - torch.arange(k_position, k_position + k.shape[1])
            seen = (distance >= 0) & (distance < (spec.window_tokens or math.inf))
            if not seen.any():
                continue
            keys, values = k[:, seen], v[:, seen]
            logits = (q[row].unflatten(0, (k.shape[0], -1)) @ keys.mT).flatten(0, 1) * spec.scale
            largest = max(largest, float(logits.abs().max()))
            if spec.soft_cap:
                logits = torch.tanh(logits / spec.soft_cap) * spec.soft_cap
            lse[row] = torch.logsumexp(logits, 1)
            o[row] = (torch.softmax(logits, 1).unflatten(0, (v.shape[0], -1)) @ values).flatten(0, 1)
        return Textbook(o, lse, largest, float(v.abs().max()) if v.numel() else 0.0)

    return attend


@pytest.fixture(scope="session")
def assert_close():
    """assert_close(state, expected, tolerance).

    The bound of o is tolerance x max|V| x max(1, max|logit| / 64), plus the rounding to its dtype. That of
    lse is tolerance x max(1, max|logit|), because float32 numbers around 1e4 are 1e-3 apart.
    """

    def check(state: State, expected: Textbook, tolerance: float) -> None:
        assert not state.o.isnan().any() and not state.lse.isnan().any()
        bound = tolerance * expected.largest_v * max(1.0, expected.largest_logit / 64)
        bound += _ROUNDING.get(state.o.dtype, 0.0) * expected.largest_v
        assert (state.o.double() - expected.o).abs().max() <= bound
        some = expected.lse.isfinite()
        assert torch.equal(state.lse.isfinite(), some) and not (state.lse == torch.inf).any()
        error = (state.lse.double() - expected.lse)[some].abs()
        assert not error.numel() or error.max() <= tolerance * max(1.0, expected.largest_logit)

    return check


@pytest.fixture(scope="session")
def store_tokens():
    """store_tokens(spec, format, tokens, *, seed=0, ...) -> StoredTokens: random tokens in layer 1 of 2.

    Token 0 is at slot ``first`` of the first block, and ``gap_blocks`` unused blocks follow each block.
    """

    def store(spec, format, tokens, *, seed=0, block_tokens=4, first=0, gap_blocks=0):
        random = torch.Generator().manual_seed(seed)
        layout = KVLayout.of(spec, layers=2, format=format)._replace(block_tokens=block_tokens)
        blocks = -(-(first + tokens) // block_tokens)
        stride = layout.block_bytes * (1 + gap_blocks)
        memory = torch.full((max(blocks, 1) * stride,), 0xFF, dtype=torch.uint8)
        k = torch.randn(spec.k_heads, tokens, spec.k_dim, generator=random, dtype=torch.float64)
        v = torch.randn(spec.v_heads, tokens, spec.v_dim, generator=random, dtype=torch.float64)
        rows = {"k": quantise(k, format), "v": quantise(k[..., : spec.v_dim] if spec.v_in_k else v, format)}
        for block in range(first // block_tokens, blocks):
            stored = layout.stored(memory[block * stride : block * stride + layout.block_bytes], 1)
            begin, end = max(block * block_tokens - first, 0), min((block + 1) * block_tokens - first, tokens)
            slots = slice(begin + first - block * block_tokens, end + first - block * block_tokens)
            for name, (payload, scales) in rows.items():
                getattr(stored, name)[:, slots] = payload[:, begin:end]
                getattr(stored, f"{name}_scales")[:, slots] = scales[:, begin:end]
        dims = {"k": spec.k_dim, "v": spec.v_dim}
        values = {n: dequantise(*rows[n], format, dims[n], dtype=torch.float64) for n in rows}
        return StoredTokens(layout, memory, stride, values["k"], values["v"])

    return store


class LongSequence(NamedTuple):
    """A sequence long enough for five threads to share, in float32 blocks of 256, token 0 at slot 9."""

    spec: AttentionSpec
    tokens: int
    stored: StoredTokens

    def plan(self, *, rows=2, positions=None, **options):
        """A native plan in which every row reads the whole sequence."""
        return cpu.plan(
            WorkList.of([(0, rows, 0, 0, 2)]),
            Segments.of([(0, self.stored.stride, 9, self.tokens, 0, 0, 2)]),
            self.stored.memory,
            self.stored.layout,
            self.spec,
            positions=torch.full((rows,), self.tokens) if positions is None else positions,
            **options,
        )

    def queries(self, rows=2, seed=0):
        return torch.randn(rows, 4, 64, generator=torch.Generator().manual_seed(seed))

    def run(self, plan, q):
        out = State.identity(*q.shape[:2], 64, device="cpu")
        cpu.partial(plan, 1, q, out=out)
        return out


@pytest.fixture(scope="session")
def sequence(store_tokens):
    spec = AttentionSpec(4, 2, 2, 64, 64, scale=0.125)
    return LongSequence(spec, 3000, store_tokens(spec, KVFormat.FLOAT32, 3000, block_tokens=256, first=9))


@pytest.fixture(scope="session")
def textbook_merge():
    """textbook_merge(states, *, sink=None) -> the merged state in float64. Ignores the o of empty states."""

    def merge(states, *, sink=None):
        lses = torch.stack([state.lse for state in states]).double()
        lse = torch.logsumexp(lses, dim=0)
        if sink is not None:
            lse = torch.logaddexp(lse, sink.double().expand_as(lse))
        weights = torch.exp(lses - lse.nan_to_num(neginf=0.0))
        values = (state.o.double().nan_to_num() for state in states)
        return State(sum(w[..., None] * o for w, o in zip(weights, values, strict=True)), lse)

    return merge
