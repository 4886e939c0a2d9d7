"""Reads the sampling that a model's authors recommend: the defaults of requests that leave options unset.

Called by the gateway, which completes requests by them, and by the cluster's driver, so that a wrong file is
reported before anything is started. Three places have them, in the same meaning: ``generation_config.json``
beside the weights, a GGUF file's ``general.sampling.*`` (llama.cpp's converter copies them from that file),
and the file that ``--generation-config`` names. It must not import torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farshore.errors import ModelError
from farshore.model_spec import AUTO, NO_GENERATION_CONFIG, ModelSpec
from farshore.models.config.hf import end_ids
from farshore.models.files.gguf import GgufFile
from farshore.models.files.selection import GENERATION_CONFIG
from farshore.models.files.source import ModelSource, expanded, read_json
from farshore.sampling import RANGES, WARM

_FROM_GGUF = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
_MOST_WHOLE = (1 << 31) - 1
_FIX = "correct it, or start with --generation-config none"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Options of :class:`~farshore.sampling.Sampling`; None: the model names none. As in vLLM, ``do_sample``
    is not read: a temperature that is named applies."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    """A default, no limit: a request may ask for more."""
    eos_token_ids: tuple[int, ...] = ()
    """End tokens of a file that the operator named, in place of the model's own; empty: these stay."""


def load_generation(spec: ModelSpec, source: ModelSource, *, vocab: int) -> GenerationDefaults:
    """The defaults that ``spec.generation_config`` asks for, of the model at ``source``. ``vocab``: its token
    ids. Raises ModelError, which names the file, the key and the fix."""
    if spec.generation_config == NO_GENERATION_CONFIG:
        return GenerationDefaults()
    if spec.generation_config != AUTO:
        path = expanded(spec.generation_config)
        path = path / GENERATION_CONFIG if path.is_dir() else path
        try:
            given = read_json(path)
        except ModelError as error:
            raise ModelError(f"--generation-config {error}") from error
        return _defaults(given, str(path), eos_token_ids=end_ids(given, vocab, str(path)))
    if source.kind == "gguf":
        file = GgufFile.open(source.path)
        named = {name: file.get(key) for name, key in _FROM_GGUF.items()}
        return _defaults(named, source.name, key_of=lambda name: _FROM_GGUF.get(name, name))
    path = Path(source.path) / GENERATION_CONFIG
    return _defaults(read_json(path), str(path)) if path.exists() else GenerationDefaults()


def _defaults(
    given: Mapping[str, Any],
    where: str,
    *,
    key_of: Callable[[str], str] = lambda name: name,
    eos_token_ids: tuple[int, ...] = (),
) -> GenerationDefaults:
    """``given``: by transformers' names; a key that is absent or null is unset. ``key_of``: the name that the
    file itself has for a key."""

    def wrong(name: str, words: str) -> ModelError:
        return ModelError(f"{where}: {key_of(name)} must be {words}, not {given[name]!r:.80}; {_FIX}")

    def number(name: str) -> float | None:
        value = given.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not RANGES[name].has(value):
            raise wrong(name, f"a number {RANGES[name].words}")
        if name == "temperature" and value and not WARM.has(value):
            raise wrong(name, WARM.words)
        return float(value)

    def whole(name: str, low: int, words: str) -> int | None:
        value = given.get(name)
        if value is not None and (type(value) is not int or not low <= value <= _MOST_WHOLE):
            raise wrong(name, words)
        return value

    top_k = whole("top_k", -1, "a whole number from 0 (all tokens) on")
    return GenerationDefaults(
        temperature=number("temperature"),
        # -1, too, is all tokens for vLLM.
        top_k=None if top_k is None else max(top_k, 0),
        top_p=number("top_p"),
        min_p=number("min_p"),
        repetition_penalty=number("repetition_penalty"),
        max_tokens=whole("max_new_tokens", 1, "a whole number above 0"),
        eos_token_ids=eos_token_ids,
    )
