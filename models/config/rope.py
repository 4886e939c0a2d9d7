"""The rotary embedding's constants and inverse frequencies.

A module of its own because the configuration needs the constants without torch, and because each kind of
scaling has its own formula. Called by ``config`` (parsing) and ``llama`` (frequencies). It must not know
about layers or import torch: the frequencies are computed by the operators of the caller's tensor.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from farshore.errors import ModelError
from farshore.models.files.gguf import GgufFile

if TYPE_CHECKING:
    from torch import Tensor

KINDS = "'default', 'linear', 'llama3'"


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Constants of the rotary embedding.

    ``factor``: for kinds linear and llama3. ``low_freq_factor``, ``high_freq_factor``,
    ``original_positions``: for llama3. ``factors``: for kind factors, one divisor per frequency (head_dim/2
    of them), which is how GGUF files store llama3 scaling.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "factors"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192
    factors: tuple[float, ...] = ()

    def check(self, name: str, *, head_dim: int) -> None:
        """Raises ModelError if a constant is out of range."""
        for field in ("theta", "factor", "low_freq_factor", "high_freq_factor", "original_positions"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ModelError(f"{name}: rope {field} must be a positive number, not {value!r}")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ModelError(f"{name}: rope high_freq_factor must exceed low_freq_factor")
        if self.kind == "factors" and (len(self.factors) != head_dim // 2 or not min(self.factors) > 0):
            raise ModelError(f"{name}: rope_freqs.weight needs {head_dim // 2} positive factors")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], name: str) -> "RopeConfig":
        """Reads transformers 5's ``rope_parameters``, or the older ``rope_theta`` with ``rope_scaling``.
        Raises ModelError."""
        given = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(given, Mapping):
            raise ModelError(f"{name}: rope parameters must be an object, not {given!r}")
        if given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
            raise ModelError(f"{name}: a partial_rotary_factor other than 1 is unsupported")
        kind = given.get("rope_type", given.get("type", "default"))
        theta = given.get("rope_theta", config.get("rope_theta", 10000.0))
        try:
            if kind == "default":
                return cls(theta=theta)
            if kind == "linear":
                return cls(theta=theta, kind="linear", factor=given["factor"])
            if kind == "llama3":
                return cls(
                    theta=theta,
                    kind="llama3",
                    factor=given["factor"],
                    low_freq_factor=given["low_freq_factor"],
                    high_freq_factor=given["high_freq_factor"],
                    original_positions=given["original_max_position_embeddings"],
                )
        except KeyError as error:
            raise ModelError(f"{name}: rope kind {kind!r} lacks {error.args[0]!r} in config.json") from None
        raise ModelError(f"{name}: rope kind {kind!r} is unsupported; supported: {KINDS}")

    @classmethod
    def from_gguf(cls, file: GgufFile, *, head_dim: int) -> "RopeConfig":
        """Reads ``llama.rope.*`` and, if present, the tensor ``rope_freqs.weight``. Raises ModelError."""
        theta = float(file.number("llama.rope.freq_base", 10000.0))
        if file.get("llama.rope.dimension_count", head_dim) != head_dim:
            raise ModelError(f"{file.path}: rotating a part of each head is unsupported")
        kind = file.get("llama.rope.scaling.type", "none")
        if "rope_freqs.weight" in file.tensor_names:
            factors = tuple(float(factor) for factor in file.tensor("rope_freqs.weight").ravel())
            return cls(theta=theta, kind="factors", factors=factors)
        if kind == "none":
            return cls(theta=theta)
        if kind == "linear":
            return cls(theta=theta, kind="linear", factor=float(file.number("llama.rope.scaling.factor")))
        raise ModelError(f"{file.path}: rope kind {kind!r} is unsupported; supported: 'none', 'linear'")


def inverse_frequencies(rope: RopeConfig, exponents: "Tensor") -> "Tensor":
    """The angle per position, in radians, of each pair of elements.

    ``exponents``: f32 [head_dim/2], ``0, 2, 4, … / head_dim``. Returns f32 of the same shape. Rounds like
    transformers, so the scalar operations and their order must stay as they are.
    """
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "factors":
        return frequencies / frequencies.new_tensor(rope.factors)
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    return frequencies


def _llama3(rope: RopeConfig, frequencies: "Tensor") -> "Tensor":
    """Divides low frequencies by ``factor``, keeps high ones, and blends linearly in between."""
    wavelengths = 2 * math.pi / frequencies
    longest_kept = rope.original_positions / rope.high_freq_factor
    shortest_scaled = rope.original_positions / rope.low_freq_factor
    slowed = frequencies / rope.factor
    share = rope.original_positions / wavelengths - rope.low_freq_factor
    share = share / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - share) * frequencies / rope.factor + share * frequencies
    scaled = slowed.where(wavelengths > shortest_scaled, frequencies)
    between = (wavelengths >= longest_kept) & (wavelengths <= shortest_scaled)
    return blended.where(between, scaled)
