"""Builds a tokenizer from a GGUF file's metadata.

Called by ``load``. It must not know about weights.
"""

import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from farshore.errors import ModelError
from farshore.models.files.gguf import GgufFile
from farshore.models.tokenizer.tokenizer import SPECIAL, Tokenizer

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
# The supported values of tokenizer.ggml.pre, which says how text is split before merging. Listed are the
# splits that were compared with transformers token for token. SmolLM2 was trained with digits split off
# first. transformers ignores that when it reads the GGUF file, and so does this module: ids differ only where
# several blanks or newlines precede a digit.
_SPLITS = {"smollm", "gpt-2"}


def from_gguf(file: GgufFile, name: str) -> Tokenizer:
    """Reads ``tokenizer.*`` metadata. Raises ModelError for all but byte-level BPE with a known split."""
    model, split = file.need("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre")
    if model != "gpt2" or split not in _SPLITS:
        known = ", ".join(f"'gpt2' with split {name!r}" for name in sorted(_SPLITS))
        raise ModelError(
            f"{file.path}: tokenizer {model!r} with split {split!r} is unsupported; supported: {known}; "
            "or give the model's Hugging Face directory"
        )
    tokens = file.texts("tokenizer.ggml.tokens")
    backend = _byte_level(file, tokens)
    ids = _special_ids(file, len(tokens))
    if file.get("tokenizer.ggml.add_bos_token") is True and "bos_token" in ids:
        bos = tokens[ids["bos_token"]]
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, ids["bos_token"])]
        )
    return Tokenizer(
        backend,
        name=name,
        special_tokens={role: tokens[token] for role, token in ids.items() if role in SPECIAL},
        # Llama 3 ends a turn with its own token.
        eos_ids=tuple(dict.fromkeys(ids[role] for role in ("eos_token", "eot_token") if role in ids)),
        chat_template=file.get("tokenizer.chat_template"),
    )


def _byte_level(file: GgufFile, tokens: list[str]) -> tokenizers.Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in file.texts("tokenizer.ggml.merges")]
    vocabulary = {text: token for token, text in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise ModelError(f"{file.path}: two tokens have the same text; convert the model again")
    try:
        backend = tokenizers.Tokenizer(BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # tokenizers raises plain Exception, over several lines
        raise ModelError(f"{file.path}: merges don't fit the vocabulary; convert the model again") from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, file.get("tokenizer.ggml.token_type", []), strict=False))
    backend.add_special_tokens(
        [AddedToken(text, normalized=False) for text, kind in kinds if kind == _CONTROL]
    )
    backend.add_tokens([AddedToken(text, normalized=False) for text, kind in kinds if kind == _USER_DEFINED])
    return backend


def _special_ids(file: GgufFile, count: int) -> dict[str, int]:
    """The ids of special tokens by role. ModelError unless all are below ``count``."""
    keys = {
        "bos_token": "bos",
        "eos_token": "eos",
        "eot_token": "eot",
        "unk_token": "unknown",
        "pad_token": "padding",
    }
    given = {role: file.get(f"tokenizer.ggml.{key}_token_id") for role, key in keys.items()}
    ids = {role: token for role, token in given.items() if token is not None}
    for role, token in ids.items():
        if type(token) is not int or not 0 <= token < count:
            raise ModelError(
                f"{file.path}: {role} {token!r} lies outside the vocabulary; convert the model again"
            )
    return ids
