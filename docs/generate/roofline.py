"""What a decode step costs at best, with KV on the GPU and with KV on CPU shards: the model behind
``docs/accelerators.md``.

Used by ``accelerators``, which prints its tables, and by tests. Times are in seconds, sizes in bytes. Nothing
here was measured on a GPU: a roofline says what can't be beaten, and where two ways cross.
"""

from dataclasses import dataclass
from itertools import takewhile

EFFICIENCY = 0.8
"""Part of a memory's bandwidth that attention and weights read with: the bar of ``farshore bench``, for CPUs
and GPUs alike."""
GEMM_EFFICIENCY = 0.6
USABLE = 0.9
"""Part of a memory that weights and KV may take."""
LINK_BYTES_S = 12.5e9
"""The engine's network: 100 Gb/s, for all shards together."""
HOP_S = 50e-6
"""One frame and its answer over TCP, without its bytes: 24 to 52 µs were measured on one host."""
MOST_STEP_S = 0.1
"""The slowest step that is looked at: ten tokens a second for each sequence."""
BATCHES = sorted({round(2 ** (eighth / 8)) for eighth in range(8 * 14)})
"""Sizes of a batch that are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    name: str
    layers: int
    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int = 128_256
    weight_bits: float = 16.0
    kv_bits: float = 16.0

    @property
    def parameters(self) -> int:
        return self.step_parameters + self.vocabulary * self.hidden

    @property
    def step_parameters(self) -> int:
        """Those that a step reads: all but the embedding."""
        attention = 2 * self.hidden * self.head_dim * (self.q_heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.vocabulary * self.hidden

    @property
    def weight_bytes(self) -> float:
        return self.parameters * self.weight_bits / 8

    @property
    def kv_token_bytes(self) -> float:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_bits / 8

    def layer_wire_bytes(self, rows: int, shards: int) -> float:
        """Of one layer, both ways, if every sequence is cut over all shards by token range: see
        ``attention_offload/transport/frames.py``. With ``shards`` 1 also of a cut by head."""
        return shards * (24 + rows * self.q_heads * (2 * 2 * self.head_dim + 4))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    name: str
    memory_bytes: float
    bandwidth_bytes_s: float
    flops_s: float

    def dense_s(self, model: Model, rows: int) -> float:
        """The dense part of a step: its weights are read once, and multiplied with each row."""
        read_s = model.step_parameters * model.weight_bits / 8 / (EFFICIENCY * self.bandwidth_bytes_s)
        return max(read_s, 2 * model.step_parameters * rows / (GEMM_EFFICIENCY * self.flops_s))

    def kv_room_bytes(self, model: Model) -> float:
        """What the weights leave for KV; negative if they do not fit."""
        return USABLE * self.memory_bytes - model.weight_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """Equal memory nodes."""

    count: int
    bandwidth_bytes_s: float = 460e9
    memory_bytes: float = 768e9

    def attention_s(self, model: Model, kv_tokens: float) -> float:
        return kv_tokens * model.kv_token_bytes / (EFFICIENCY * self.count * self.bandwidth_bytes_s)

    def wire_s(self, model: Model, rows: int) -> float:
        """All layers' hops, which are paid one after the other."""
        return model.layers * (HOP_S + model.layer_wire_bytes(rows, self.count) / LINK_BYTES_S)


LLAMA_8B = Model(name="8B", layers=32, hidden=4096, intermediate=14_336, q_heads=32, kv_heads=8, head_dim=128)
_70B = {"layers": 80, "hidden": 8192, "intermediate": 28_672, "q_heads": 64, "kv_heads": 8, "head_dim": 128}
LLAMA_70B = Model(name="70B", **_70B)
LLAMA_70B_4BIT = Model(name="70B, 4-bit weights", weight_bits=4.5, **_70B)
H100 = Gpu(name="H100", memory_bytes=80e9, bandwidth_bytes_s=3.35e12, flops_s=989e12)
L4 = Gpu(name="L4", memory_bytes=24e9, bandwidth_bytes_s=300e9, flops_s=121e12)


def local_s(model: Model, gpu: Gpu, rows: int, context: int) -> float | None:
    """A step with all KV on the GPU; None if that does not fit."""
    kv_bytes = rows * context * model.kv_token_bytes
    if kv_bytes > gpu.kv_room_bytes(model):
        return None
    return gpu.dense_s(model, rows) + kv_bytes / (EFFICIENCY * gpu.bandwidth_bytes_s)


def offloaded_s(model: Model, gpu: Gpu, shards: Shards, rows: int, context: int) -> float | None:
    """A step with all KV on shards, in one micro-batch or two, whichever is quicker; None if weights or KV do
    not fit. Of two micro-batches each reads the weights, and one waits for its shards while the other
    computes."""
    kv_tokens = rows * context
    if gpu.kv_room_bytes(model) < 0 or kv_tokens * model.kv_token_bytes > (
        USABLE * shards.count * shards.memory_bytes
    ):
        return None
    attention_s = shards.attention_s(model, kv_tokens)
    one_s = gpu.dense_s(model, rows) + attention_s + shards.wire_s(model, rows)
    if rows == 1:
        return one_s
    half_s = gpu.dense_s(model, rows // 2)
    latency_s = half_s + attention_s / 2 + shards.wire_s(model, rows // 2)
    return min(one_s, max(latency_s, 2 * half_s, attention_s))


def best_local(model: Model, gpu: Gpu, context: int) -> tuple[int, float] | None:
    """The batch with the most tokens a second, and how many; None if not one sequence fits, or in time."""
    rows = int(gpu.kv_room_bytes(model) // (context * model.kv_token_bytes))
    batches = [*takewhile(lambda each: each < rows, BATCHES), rows] if rows > 0 else []
    return _best({each: local_s(model, gpu, each, context) for each in batches})


def best_offloaded(model: Model, gpu: Gpu, shards: Shards, context: int) -> tuple[int, float] | None:
    return _best({each: offloaded_s(model, gpu, shards, each, context) for each in BATCHES})


def quicker_from_tokens(model: Model, gpu: Gpu, shards: Shards) -> float | None:
    """The context from which one sequence's step is quicker offloaded; None: never, the shards together read
    no faster than the GPU."""
    gain_s = 1 / gpu.bandwidth_bytes_s - 1 / (shards.count * shards.bandwidth_bytes_s)
    if gain_s <= 0:
        return None
    return shards.wire_s(model, 1) * EFFICIENCY / (model.kv_token_bytes * gain_s)


def fewest_shards(model: Model, gpu: Gpu, context: int) -> int | None:
    """With how many shards offloading generates more tokens a second than the GPU by itself; None: 64 are too
    few."""
    alone = best_local(model, gpu, context)
    for count in range(1, 65):
        found = best_offloaded(model, gpu, Shards(count=count), context)
        if found is not None and (alone is None or found[1] > alone[1]):
            return count
    return None


def wire_bytes_s(model: Model, *, rows: int, copies: int, step_s: float, allowance: float) -> float:
    """Lamina's inequality (arXiv 2405.01814): the bandwidth with which a step's bytes, q and o ``copies``
    times and the new k and v once, take at most ``allowance`` of the ``step_s`` that computing takes. A cut
    by head needs one copy of q and o, one by token range a copy for each shard."""
    kv_ratio = 2 * model.kv_heads / model.q_heads
    moved = (2 * copies + kv_ratio) * 2 * model.q_heads * model.head_dim * rows * model.layers
    return moved / (allowance * step_s)


def _best(steps: dict[int, float | None]) -> tuple[int, float] | None:
    """The smallest batch that is as good as the best, but for half a percent."""
    rates = {rows: rows / step_s for rows, step_s in steps.items() if step_s and step_s <= MOST_STEP_S}
    enough = 0.995 * max(rates.values(), default=0.0)
    return next(((rows, rate) for rows, rate in sorted(rates.items()) if rate >= enough), None)
