"""The rotary embedding's constants, and the frequencies and the scale that they give.

A module of its own because the configuration needs the constants without torch, and because each kind of
scaling has its own formula. Made by ``rope_parameters``; called by ``positions`` and ``llama``. It must not
know about files or layers, or import torch: frequencies are computed by the operators of the caller's tensor.

Every formula rounds like transformers' ``modeling_rope_utils``: scalar operations and their order must stay
as they are.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from farshore.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Constants of the rotary embedding. Fields that a kind does not name have no effect on it.

    ``factor``: all kinds but default and longrope. ``original_positions``: the positions before scaling, for
    dynamic, yarn, longrope and llama3. ``low_freq_factor``, ``high_freq_factor``: llama3. ``beta_fast``,
    ``beta_slow``, ``truncate``: yarn. ``short_factors``, ``long_factors``: longrope, a divisor for each
    frequency (head_dim/2 of them). ``factors``: further divisors, one for each frequency, or none; GGUF files
    store llama3 scaling in this form. ``attention_factor``: multiplies cosines and sines, in every kind.

    Kinds dynamic and longrope depend on the length of the sequence. Stored keys are rotated once and shared
    by sequences of all lengths, so these kinds have one length for the model: the served length.
    """

    theta: float = 10000.0
    kind: Kind = "default"
    factor: float = 1.0
    original_positions: float = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    factors: tuple[float, ...] = ()
    attention_factor: float = 1.0

    @property
    def by_length(self) -> bool:
        """Whether sequences above ``original_positions`` are rotated by other angles than shorter ones."""
        return self.kind in ("dynamic", "longrope")

    def check(self, name: str, *, head_dim: int) -> None:
        """Raises ModelError if a constant is out of range."""
        for field in (
            "theta",
            "factor",
            "original_positions",
            "low_freq_factor",
            "high_freq_factor",
            "beta_fast",
            "beta_slow",
            "attention_factor",
        ):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ModelError(f"{name}: rope {field} must be a positive number, not {value!r}")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ModelError(f"{name}: rope high_freq_factor must exceed low_freq_factor")
        if self.kind == "yarn" and not self.theta > 1:
            raise ModelError(f"{name}: rope kind 'yarn' needs a theta above 1, not {self.theta!r}")
        if self.kind == "dynamic" and head_dim < 4:
            raise ModelError(f"{name}: rope kind 'dynamic' needs a head_dim of 4 or more, not {head_dim}")
        needed = ("short_factors", "long_factors") if self.kind == "longrope" else ()
        for field in (*needed, *(("factors",) if self.factors else ())):
            values = getattr(self, field)
            if len(values) != head_dim // 2 or not all(0 < value < math.inf for value in values):
                raise ModelError(f"{name}: rope {field} must be {head_dim // 2} positive numbers")


def inverse_frequencies(rope: RopeConfig, exponents: "Tensor", *, positions: int) -> "Tensor":
    """The angle per position, in radians, of each pair of elements.

    ``exponents``: f32 [head_dim/2], ``0, 2, 4, … / head_dim``. ``positions``: the served length, for kinds
    dynamic and longrope. Returns f32 [head_dim/2].
    """
    if rope.kind == "dynamic":
        frequencies = _dynamic(rope, exponents, positions)
    elif rope.kind == "yarn":
        frequencies = _yarn(rope, exponents)
    elif rope.kind == "longrope":
        factors = rope.long_factors if positions > rope.original_positions else rope.short_factors
        frequencies = 1.0 / (exponents.new_tensor(factors) * rope.theta**exponents)
    else:
        frequencies = 1.0 / (rope.theta**exponents)
        if rope.kind == "linear":
            frequencies = frequencies / rope.factor
        elif rope.kind == "llama3":
            frequencies = _llama3(rope, frequencies)
    if rope.factors:
        frequencies = frequencies / frequencies.new_tensor(rope.factors)
    return frequencies


def _dynamic(rope: RopeConfig, exponents: "Tensor", positions: int) -> "Tensor":
    """A larger theta, which grows with the length."""
    dimensions = 2 * len(exponents)
    # transformers computes theta in float64 up to the original length, and in float32 above it.
    within = positions <= rope.original_positions
    length = rope.original_positions if within else exponents.new_tensor(float(positions))
    growth = (rope.factor * length / rope.original_positions) - (rope.factor - 1)
    theta = rope.theta * growth ** (dimensions / (dimensions - 2))
    return 1.0 / (theta**exponents)


def _yarn(rope: RopeConfig, exponents: "Tensor") -> "Tensor":
    """Keeps frequencies of more than ``beta_fast`` rotations in the original positions, divides those of less
    than ``beta_slow`` by ``factor``, and blends linearly in between."""
    dimensions = 2 * len(exponents)

    def dimension_of(rotations: float) -> float:
        turns = math.log(rope.original_positions / (rotations * 2 * math.pi))
        return (dimensions * turns) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dimensions - 1)
    if low == high:
        high += 0.001  # transformers' constant, against a division by zero
    wavelengths = rope.theta**exponents
    indices = exponents.new_tensor(range(len(exponents)))
    kept = 1 - ((indices - low) / (high - low)).clamp(0, 1)
    return 1.0 / (rope.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


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
