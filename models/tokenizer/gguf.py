"""Builds a tokenizer from a GGUF file's metadata.

A GGUF file has no ``tokenizer.json``, but the vocabulary, and merges or scores, under llama.cpp's keys. Two
kinds are rebuilt so that they give the ids of the model's own tokenizer: byte-level BPE ("gpt2") with a known
split, and SentencePiece BPE ("llama"). Called by ``load``. It must not know about weights.
"""

import math
from collections.abc import Mapping

import tokenizers
from tokenizers import processors

from farshore.errors import ModelError
from farshore.models.files.gguf import GgufFile
from farshore.models.tokenizer.gguf_splits import SPLITS, Split
from farshore.models.tokenizer.spm import PieceType, add_whole_tokens, build_spm
from farshore.models.tokenizer.tokenizer import SPECIAL, Tokenizer

# Role -> its key: tokenizer.ggml.<key>_token_id.
_ROLES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "eot_token": "eot",  # end of turn
    "eom_token": "eom",  # end of message: a tool call
    "unk_token": "unknown",
    "pad_token": "padding",
}
_ENDS = ("eos_token", "eot_token", "eom_token")
# The ids of SentencePiece's trainer, which old files leave out.
_SPM_IDS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}
# Tokens that end a turn though the file may not say so, as in llama.cpp. A chat template often ends turns
# with a token that is not the end of text.
_END_TEXTS = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<｜end▁of▁sentence｜>",  # noqa: RUF001 - DeepSeek's bars are wide
        "<EOT>",
        "_<EOT>",
        "<end_of_utterance>",
    }
)
# A vocabulary with these two is gpt-oss's, where <|end|> ends a message but not the answer.
_HARMONY_ENDS = frozenset({"<|return|>", "<|call|>"})
_WHOLE = (PieceType.CONTROL, PieceType.USER_DEFINED)
# Their SentencePiece vocabularies are read differently, which the metadata don't say.
_OTHER_SPM = ("gemma", "phi3")


def from_gguf(file: GgufFile, name: str) -> Tokenizer:
    """Reads ``tokenizer.*`` metadata. Raises ModelError, also for all other kinds and splits."""
    kind, pre = file.need("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre")
    architecture = str(file.get("general.architecture"))
    split = SPLITS.get(pre) if kind == "gpt2" and isinstance(pre, str) else None
    if split is None and (kind != "llama" or architecture.startswith(_OTHER_SPM)):
        raise _unsupported(file, kind, pre, architecture)
    tokens = file.texts("tokenizer.ggml.tokens")
    if len(set(tokens)) < len(tokens):
        raise ModelError(f"{file.path}: two tokens have the same text; convert the model again")
    types = _types(file, len(tokens))
    ids = _special_ids(file, types, is_spm=split is None)
    _type_roles(ids, types, is_spm=split is None)
    backend = _spm(file, tokens, types) if split is None else _byte_level(file, split, tokens, types)
    backend.post_processor = _around(
        tokens,
        bos=_added(file, "bos_token", default=split is None or split.adds_bos, ids=ids),
        eos=_added(file, "eos_token", default=False, ids=ids),
    )
    template = file.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ModelError(f"{file.path}: tokenizer.chat_template isn't a text; convert the model again")
    return Tokenizer(
        backend,
        name=name,
        special_tokens={role: tokens[token] for role, token in ids.items() if role in SPECIAL},
        eos_ids=_end_ids(ids, tokens, types),
        chat_template=template,
    )


def _unsupported(file: GgufFile, kind: object, pre: object, architecture: str) -> ModelError:
    asked = f"{kind!r} with split {pre!r}" if kind == "gpt2" else f"{kind!r} of architecture {architecture!r}"
    return ModelError(
        f"{file.path}: tokenizer {asked} is unsupported; supported: 'llama' (SentencePiece), and 'gpt2' with "
        f"split {', '.join(sorted(SPLITS))}; give the model's Hugging Face directory instead"
    )


def _types(file: GgufFile, count: int) -> list[int]:
    """The type of each token, NORMAL if the file gives none."""
    types = file.get("tokenizer.ggml.token_type", [PieceType.NORMAL] * count)
    if not isinstance(types, list) or len(types) != count or not all(isinstance(kind, int) for kind in types):
        raise ModelError(
            f"{file.path}: tokenizer.ggml.token_type isn't a list of {count} numbers; convert the model again"
        )
    return list(types)


def _special_ids(file: GgufFile, types: list[int], *, is_spm: bool) -> dict[str, int]:
    """The ids of special tokens by role. ModelError unless all are ids of the vocabulary."""
    ids = {}
    for role, key in _ROLES.items():
        token = file.get(f"tokenizer.ggml.{key}_token_id")
        if token is None and is_spm and role in _SPM_IDS and _SPM_IDS[role] < len(types):
            default = _SPM_IDS[role]
            token = default if types[default] in (PieceType.CONTROL, PieceType.UNKNOWN) else None
        if token is None:
            continue
        if type(token) is not int or not 0 <= token < len(types):
            raise ModelError(
                f"{file.path}: {role} {token!r} lies outside the vocabulary; convert the model again"
            )
        ids[role] = token
    return ids


def _type_roles(ids: Mapping[str, int], types: list[int], *, is_spm: bool) -> None:
    """Gives tokens the types that their roles demand: files of 2023 call all tokens normal. Padding is often
    the id of a normal token, such as "!", which must stay one."""
    special = {ids[role] for role in ("bos_token", *_ENDS) if role in ids}
    if "pad_token" in ids and types[ids["pad_token"]] == PieceType.UNUSED:
        special.add(ids["pad_token"])
    for token in special:
        types[token] = PieceType.CONTROL
    if is_spm and "unk_token" in ids:
        types[ids["unk_token"]] = PieceType.UNKNOWN


def _byte_level(file: GgufFile, split: Split, tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    # The halves are joined by a blank, and the first half may begin with one.
    texts = file.texts("tokenizer.ggml.merges")
    try:
        merges = [(text[: (cut := text.index(" ", 1))], text[cut + 1 :]) for text in texts]
        backend = split.build({text: token for token, text in enumerate(tokens)}, merges)
    except Exception as error:  # tokenizers raises plain Exception, over several lines
        raise ModelError(f"{file.path}: merges don't fit the vocabulary; convert the model again") from error
    add_whole_tokens(backend, tokens, types)
    return backend


def _spm(file: GgufFile, tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    scores = file.need("tokenizer.ggml.scores")
    if (
        not isinstance(scores, list)
        or len(scores) != len(tokens)
        or not all(isinstance(score, int | float) and math.isfinite(score) for score in scores)
    ):
        raise ModelError(
            f"{file.path}: tokenizer.ggml.scores isn't a list of {len(tokens)} numbers; "
            "convert the model again"
        )
    normal = {score for score, kind in zip(scores, types, strict=True) if kind == PieceType.NORMAL}
    if len(normal) == 1:
        raise ModelError(
            f"{file.path}: all tokens have the same score, so their merges are unknown; "
            "convert the model again with its tokenizer.model beside it"
        )
    for key in ("precompiled_charsmap", "remove_extra_whitespaces"):
        if file.get(f"tokenizer.ggml.{key}"):
            raise ModelError(
                f"{file.path}: tokenizer.ggml.{key} is unsupported; give the model's Hugging Face directory"
            )
    known = set(tokens)
    if PieceType.UNKNOWN not in types and not all(f"<0x{byte:02X}>" in known for byte in range(256)):
        raise ModelError(f"{file.path}: no token spells unknown characters; convert the model again")
    space_prefix = _flag(file, "add_space_prefix", default=True)
    return build_spm(tokens, scores, types, space_prefix=space_prefix)


def _flag(file: GgufFile, key: str, *, default: bool) -> bool:
    value = file.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, bool):
        raise ModelError(f"{file.path}: tokenizer.ggml.{key} isn't true or false; convert the model again")
    return value


def _added(file: GgufFile, role: str, *, default: bool, ids: Mapping[str, int]) -> int | None:
    """The id of ``role`` if the tokenizer puts that token around every text, else None."""
    if not _flag(file, f"add_{role}", default=default):
        return None
    if role not in ids:
        raise ModelError(
            f"{file.path}: adds the {role} to texts, but has no tokenizer.ggml.{_ROLES[role]}_token_id; "
            "convert the model again"
        )
    return ids[role]


def _around(tokens: list[str], *, bos: int | None, eos: int | None) -> processors.PostProcessor | None:
    """Puts ``bos`` before and ``eos`` after a text."""
    order = [("bos", bos), ("$A", None), ("eos", eos)]
    special = [
        {"id": name, "ids": [token], "tokens": [tokens[token]]} for name, token in order if token is not None
    ]
    if not special:
        return None
    single = [name for name, token in order if name == "$A" or token is not None]
    return processors.TemplateProcessing(single=single, special_tokens=special)


def _end_ids(ids: Mapping[str, int], tokens: list[str], types: list[int]) -> tuple[int, ...]:
    """The ids that end an answer: those of the ends' roles, then those of known texts."""
    whole = {tokens[token]: token for token, kind in enumerate(types) if kind in _WHOLE}
    known = _END_TEXTS & whole.keys()
    if known >= _HARMONY_ENDS:
        known -= {"<|end|>"}
    named = (ids[role] for role in _ENDS if role in ids)
    return tuple(dict.fromkeys((*named, *sorted(whole[text] for text in known))))
