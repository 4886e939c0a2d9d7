"""A model's shape, read from its files and checked once.

The engine sizes its tensors by :class:`ModelConfig`, shards their spans, and the gateway its limits. Called
by the controller, the dense worker, ``llama``, ``weights``, and the gateway, which runs without torch: this
module must not import it. It must not know about shards, KV storage or weights.
"""

from dataclasses import dataclass

from farshore.errors import ModelError
from farshore.models.config.rope import RopeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and constants of a Llama decoder. Counts are of the whole model, not of a shard.

    ``max_positions``: the served length; no sequence has more tokens. ``biases``: the matrices that have one,
    in the order q, k, v, o, gate, up, down. ``eos_token_ids``: each of them ends a generation. Empty: the
    tokenizer's files name the end tokens, as in every GGUF file. The constructor raises ModelError for a
    value that no working model has.
    """

    name: str
    layers: int
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    rms_eps: float
    rope: RopeConfig
    tied_embeddings: bool = False
    biases: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        counts = (
            "layers",
            "hidden",
            "q_heads",
            "kv_heads",
            "head_dim",
            "intermediate",
            "vocab",
            "max_positions",
        )
        for field in counts:
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ModelError(f"{self.name}: {field} must be a positive whole number, not {value!r:.80}")
        if self.q_heads % self.kv_heads:
            raise ModelError(
                f"{self.name}: {self.q_heads} query heads can't share {self.kv_heads} KV heads evenly"
            )
        if self.head_dim % 2:
            raise ModelError(f"{self.name}: head_dim must be even for rotary positions, not {self.head_dim}")
        if not isinstance(self.rms_eps, float) or not self.rms_eps > 0:
            raise ModelError(f"{self.name}: rms_eps must be a positive number, not {self.rms_eps!r}")
        self.rope.check(self.name, head_dim=self.head_dim)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q_heads // self.kv_heads

    @property
    def length_warning(self) -> str | None:
        """For the operator: that sequences of up to the original length are rotated by other angles than in
        transformers. None if they are not."""
        original = int(self.rope.original_positions)
        if not self.rope.by_length or self.max_positions <= original:
            return None
        return (
            f"{self.name}: RoPE kind {self.rope.kind!r} depends on a sequence's length; every sequence is "
            f"rotated like one of {self.max_positions} tokens. For exact answers up to {original} tokens: "
            f"--max-model-len {original}"
        )
