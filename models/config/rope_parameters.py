"""Reads rotary scaling in Hugging Face's spelling: an object with ``rope_type``, ``factor`` and others.

The same object comes from ``config.json``, from ``--rope-scaling``, and from a GGUF file's metadata, which
``gguf`` translates. Called by ``hf`` and ``gguf``. It must not know which of the two formats the model has.
"""

import math
from collections.abc import Mapping
from typing import Any

from farshore.errors import ModelError
from farshore.models.config.rope import RopeConfig
from farshore.models.config.values import number

ORIGINAL = "original_max_position_embeddings"
FLAG = "--rope-scaling"
EXAMPLE = f'{FLAG} \'{{"rope_type":"yarn","factor":4.0,"{ORIGINAL}":8192}}\''
_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor",),
        (ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (("short_factor", "long_factor"), (ORIGINAL, "attention_factor", "factor")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (ORIGINAL,)),
}
"""Kind → (the keys that it needs, the keys that it may have)."""


def check_flag(scaling: Any, name: str) -> None:
    """Raises ModelError if ``scaling``, the value of ``--rope-scaling``, is no object or has a key that its
    kind does not read: a misspelt key would be ignored otherwise."""
    if not isinstance(scaling, Mapping):
        raise ModelError(f"{name}: {FLAG} must be an object, not {scaling!r:.80}; give for example {EXAMPLE}")
    kind = _kind(scaling, name, FLAG)
    unknown = sorted(set(scaling) - {*_COMMON, *_KEYS[kind][0], *_KEYS[kind][1]})
    if unknown:
        known = ", ".join(("rope_type", "rope_theta", *_KEYS[kind][0], *_KEYS[kind][1]))
        raise ModelError(f"{name}: {FLAG}: kind {kind!r} has no key {unknown[0]!r:.80}; its keys: {known}")


def read_rope(
    given: Mapping[str, Any], *, theta: Any, max_positions: int, head_dim: int, name: str, where: str
) -> RopeConfig:
    """``theta`` and ``max_positions``: the model's, for an object without ``rope_theta`` or original length.
    ``where`` the object was found, for messages. Raises ModelError."""
    kind = _kind(given, name, where)
    if any(isinstance(value, Mapping) for value in given.values()):
        raise ModelError(f"{name}: rope parameters by layer type are unsupported; supported: one for all")
    if given.get("partial_rotary_factor") not in (None, 1):
        raise ModelError(f"{name}: a partial_rotary_factor other than 1 is unsupported")
    for key in _KEYS[kind][0]:
        if key not in given:
            hint = f"; give for example {EXAMPLE}" if where == FLAG else ""
            raise ModelError(f"{name}: rope kind {kind!r} lacks {key!r} in {where}{hint}")
    fields: dict[str, Any] = {"kind": kind, "theta": given.get("rope_theta", theta)}
    for key in ("low_freq_factor", "high_freq_factor"):
        if kind == "llama3":
            fields[key] = given[key]
    fields["original_positions"] = max_positions
    if kind in ("yarn", "longrope", "llama3"):
        fields["original_positions"] = given.get(ORIGINAL, max_positions)
    if kind in ("yarn", "longrope"):
        original = _positive(fields["original_positions"], ORIGINAL, name)
        # Without a factor, transformers takes the ratio of the lengths.
        factor = given.get("factor")
        factor = max_positions / original if factor is None else _positive(factor, "factor", name)
        fields["factor"] = factor
        fields["attention_factor"] = _attention_factor(given, kind, factor, original, name)
    elif kind != "default":
        fields["factor"] = given["factor"]
    if kind == "yarn":
        fields["beta_fast"] = given.get("beta_fast") or 32.0
        fields["beta_slow"] = given.get("beta_slow") or 1.0
        fields["truncate"] = bool(given.get("truncate", True))
    if kind == "longrope":
        fields["short_factors"] = _numbers(given["short_factor"], "short_factor", name)
        fields["long_factors"] = _numbers(given["long_factor"], "long_factor", name)
    rope = RopeConfig(**fields)
    rope.check(name, head_dim=head_dim)
    return rope


def _kind(given: Mapping[str, Any], name: str, where: str) -> str:
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "su":
        return "longrope"  # its name in the first files
    if not isinstance(kind, str) or kind not in _KEYS:
        supported = ", ".join(map(repr, _KEYS))
        raise ModelError(f"{name}: rope kind {kind!r:.80} in {where} is unsupported; supported: {supported}")
    return kind


def _attention_factor(
    given: Mapping[str, Any], kind: str, factor: float, original: float, name: str
) -> float:
    """The factor of cosines and sines: the file's, or the one that the kind's authors propose."""
    attention = given.get("attention_factor")
    if attention is not None:
        return _positive(attention, "attention_factor", name)
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        if original <= 1:
            raise ModelError(f"{name}: rope {ORIGINAL} must exceed 1, not {original!r}")
        return math.sqrt(1 + math.log(factor) / math.log(original))
    over, under = given.get("mscale"), given.get("mscale_all_dim")
    if over and under:
        over, under = _positive(over, "mscale", name), _positive(under, "mscale_all_dim", name)
        return (0.1 * over * math.log(factor) + 1.0) / (0.1 * under * math.log(factor) + 1.0)
    return 0.1 * math.log(factor) + 1.0


def _positive(value: Any, what: str, name: str) -> float:
    value = number(value, f"rope {what}", name)
    if not 0 < value < math.inf:
        raise ModelError(f"{name}: rope {what} must be a positive number, not {value!r}")
    return value


def _numbers(values: Any, what: str, name: str) -> tuple[float, ...]:
    if not isinstance(values, list):
        raise ModelError(f"{name}: rope {what} must be a list of numbers, not {values!r:.80}")
    return tuple(number(value, f"rope {what}", name) for value in values)
