"""Which tokenizer class transformers 5 takes for a folder, and what that class changes.

transformers uses ``tokenizer.json`` as it is only for its general class. A named class keeps the file's
vocabulary, merges and post-processor, and sets its own normaliser, splits and decoder. The classes that
models of supported architectures name are here; others are refused. Called by ``hf``. It must not know about
special tokens beyond a class's defaults.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from farshore.errors import ModelError

_BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_END = "<|endoftext|>"
# Models of this type take the general class, whatever class their files name.
_ALWAYS_GENERAL = ("mistral",)
_SUPPORTED_TYPES = ("llama", *_ALWAYS_GENERAL)


@dataclass(frozen=True, slots=True)
class TokenizerClass:
    """A class of transformers. ``defaults``: its special tokens by role; None for one that it lacks, whatever
    ``tokenizer.json`` says. ``build``: makes the tokenizer of a
    BPE model and ``tokenizer_config.json``'s entries; None for the general class, which takes
    ``tokenizer.json`` as it is. ``keeps_post_processor``: of ``tokenizer.json``.
    ``resets_flags``: its special tokens match as plain texts, whatever the files say."""

    name: str
    defaults: Mapping[str, str | None] = field(default_factory=dict)
    build: Callable[[models.BPE, Mapping[str, Any]], tokenizers.Tokenizer] | None = None
    keeps_post_processor: bool = True
    resets_flags: bool = False


def _llama(model: models.BPE, options: Mapping[str, Any]) -> tokenizers.Tokenizer:
    model.fuse_unk, model.byte_fallback = True, True
    backend = tokenizers.Tokenizer(model)
    prefix = options.get("add_prefix_space") in (None, True)
    scheme = ("always" if options.get("legacy") else "first") if prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_BLANK, prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _gpt2(model: models.BPE, options: Mapping[str, Any]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    prefix = bool(options.get("add_prefix_space"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    return backend


def _gpt_neox(model: models.BPE, options: Mapping[str, Any]) -> tokenizers.Tokenizer:
    backend = _gpt2(model, options)
    backend.normalizer = normalizers.NFC()
    return backend


def _qwen2(model: models.BPE, options: Mapping[str, Any]) -> tokenizers.Tokenizer:
    backend = _gpt_neox(model, options)
    prefix = bool(options.get("add_prefix_space"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ]
    )
    return backend


GENERAL = TokenizerClass("PreTrainedTokenizer")
LLAMA = TokenizerClass("LlamaTokenizer", dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>"), _llama)
_GPT2 = TokenizerClass(
    "GPT2Tokenizer", dict(unk_token=_END, bos_token=_END, eos_token=_END, pad_token=None), _gpt2
)
_QWEN2 = TokenizerClass(
    "Qwen2Tokenizer",
    dict(unk_token=_END, eos_token=_END, pad_token=_END),
    _qwen2,
    resets_flags=True,
)
_GPT_NEOX = TokenizerClass(
    "GPTNeoXTokenizer",
    dict(unk_token=_END, bos_token=_END, eos_token=_END, pad_token="<|padding|>"),
    _gpt_neox,
    keeps_post_processor=False,
)
_CLASSES = {entry.name: entry for entry in (GENERAL, LLAMA, _GPT2, _QWEN2, _GPT_NEOX)}
_CLASSES["TokenizersBackend"] = GENERAL


def choose(
    folder: Path, config: Mapping[str, Any], options: Mapping[str, Any], *, byte_level: bool
) -> TokenizerClass:
    """``config``: of ``config.json``, empty without one. ``options``: of ``tokenizer_config.json``.
    ``byte_level``: whether ``tokenizer.json`` mentions ByteLevel. Raises ModelError for other classes."""
    kind, declared = config.get("model_type"), options.get("tokenizer_class") or config.get("tokenizer_class")
    if kind is not None and kind not in _SUPPORTED_TYPES:
        raise ModelError(
            f"{folder}: the tokenizer of a model of type {kind!r} is unsupported; "
            f"supported: {', '.join(_SUPPORTED_TYPES)}"
        )
    auto_map = options.get("auto_map")
    own_code = auto_map is not None and (not isinstance(auto_map, Mapping) or "AutoTokenizer" in auto_map)
    if kind in _ALWAYS_GENERAL and (declared is None or not own_code):
        return GENERAL
    if declared is None:
        if own_code:
            raise ModelError(
                f"{folder}: its tokenizer needs code from the folder (auto_map), which is not run; "
                "save the tokenizer as PreTrainedTokenizerFast"
            )
        return GENERAL
    name = str(declared).removesuffix("Fast")
    if name == LLAMA.name and byte_level and not own_code:
        return GENERAL  # Llama 3 and its like.
    if name not in _CLASSES:
        raise ModelError(
            f"{folder}: tokenizer_class {declared!r} is unsupported; supported: {', '.join(_CLASSES)}; "
            "save the tokenizer as PreTrainedTokenizerFast"
        )
    return _CLASSES[name]


def rebuilt(
    backend: tokenizers.Tokenizer, chosen: TokenizerClass, options: Mapping[str, Any], path: Path
) -> tokenizers.Tokenizer:
    """The tokenizer that ``chosen`` makes of ``tokenizer.json``, without its added tokens. Takes the model of
    ``backend``. Raises ModelError unless that is BPE."""
    if chosen.build is None:
        return backend
    model = backend.model
    if not isinstance(model, models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        raise ModelError(
            f"{path}: tokenizer_class {chosen.name} needs a BPE model without prefixes or suffixes; "
            "save the tokenizer as PreTrainedTokenizerFast"
        )
    model.dropout, model.unk_token, model.fuse_unk = None, None, False
    model.byte_fallback, model.ignore_merges = False, False
    made = chosen.build(model, options)
    if chosen.keeps_post_processor and backend.post_processor is not None:
        made.post_processor = backend.post_processor
    return made
