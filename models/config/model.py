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

    ``eos_token_ids``: each of them ends a generation; may be empty. The constructor raises ModelError for a
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
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
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
                raise ModelError(f"{self.name}: {field} must be a positive whole number, not {value!r}")
        if self.q_heads % self.kv_heads:
            raise ModelError(
                f"{self.name}: {self.q_heads} query heads can't share {self.kv_heads} KV heads evenly"
            )
        if self.head_dim % 2:
            raise ModelError(f"{self.name}: head_dim must be even for rotary positions, not {self.head_dim}")
        if not isinstance(self.rms_eps, float) or not self.rms_eps > 0:
            raise ModelError(f"{self.name}: rms_eps must be a positive number, not {self.rms_eps!r}")
        self.rope.check(self.name, head_dim=self.head_dim)
        for token in (self.bos_token_id, *self.eos_token_ids):
            if token is not None and not (type(token) is int and 0 <= token < self.vocab):
                raise ModelError(f"{self.name}: special token id {token!r} lies outside 0..{self.vocab - 1}")

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q_heads // self.kv_heads
