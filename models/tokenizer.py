"""Converts text to token ids and back, and chat messages to a prompt.

A thin layer over Hugging Face's ``tokenizers``. A model's folder has its configuration; from a GGUF file it
is assembled from metadata. Called by the gateway, which has no torch. It must not know about weights.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from farshore.errors import ModelError
from farshore.models.chat_template import ChatTemplate
from farshore.models.gguf_file import GgufFile
from farshore.models.source import ModelSource, read_json
from farshore.models.text_stream import TextStream

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
# The supported values of tokenizer.ggml.pre, which says how text is split before merging. Listed are the
# splits that were compared with transformers token for token. SmolLM2 was trained with digits split off
# first. transformers ignores that when it reads the GGUF file, and so does this module: ids differ only where
# several blanks or newlines precede a digit.
_SPLITS = {"smollm", "gpt-2"}
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A model's tokenizer and chat template. Immutable, so threads may share it.

    ``eos_ids``: the end tokens that the tokenizer's files name; may be empty.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        name: str,
        special_tokens: Mapping[str, str],
        eos_ids: tuple[int, ...],
        chat_template: str | None,
    ) -> None:
        """``special_tokens``: texts by role, such as ``bos_token``, for the chat template."""
        self._backend = backend
        self._name = name
        self._special_tokens = dict(special_tokens)
        self._chat = None if chat_template is None else ChatTemplate(chat_template, where=name)
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token for token, entry in added.items() if entry.special)
        self.eos_ids = eos_ids
        self.vocab_size = backend.get_vocab_size()

    @classmethod
    def from_hf(cls, folder: Path, name: str) -> "Tokenizer":
        """Reads ``tokenizer.json`` and, if present, ``tokenizer_config.json`` and ``chat_template.jinja``.
        Raises ModelError."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{folder}: no tokenizer.json; save the model's fast tokenizer with transformers"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise ModelError(f"{path}: not a readable tokenizer; download it again") from error
        settings = folder / "tokenizer_config.json"
        config = read_json(settings) if settings.is_file() else {}
        special = {role: text for role in _SPECIAL if (text := _content(config.get(role))) is not None}
        eos = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
        return cls(
            backend,
            name=name,
            special_tokens=special,
            eos_ids=() if eos is None else (eos,),
            chat_template=_template_text(folder, config),
        )

    @classmethod
    def from_gguf(cls, file: GgufFile, name: str) -> "Tokenizer":
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
        return cls(
            backend,
            name=name,
            special_tokens={role: tokens[token] for role, token in ids.items() if role in _SPECIAL},
            # Llama 3 ends a turn with its own token.
            eos_ids=tuple(dict.fromkeys(ids[role] for role in ("eos_token", "eot_token") if role in ids)),
            chat_template=file.get("tokenizer.chat_template"),
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of ``text``. A special token written in the text becomes its id.

        ``add_special_tokens``: add the special tokens that the model's tokenizer puts around every text. Pass
        False for the result of ``apply_chat``, which has them already.
        """
        # `encode` keeps the interpreter's lock, for seconds if the text is long; a batch of one releases it.
        (encoded,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoded.ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens. Bytes that form no character become U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=True)

    def apply_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt text of ``messages`` (each with 'role' and 'content').

        Raises ModelError if the model has no chat template, InvalidRequest if the template refuses the
        messages.
        """
        if self._chat is None:
            raise ModelError(
                f"{self._name}: has no chat template; send a plain prompt, or use an instruct model"
            )
        return self._chat.render(messages, self._special_tokens, add_generation_prompt=add_generation_prompt)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """``apply_chat``, then ``encode`` without a second beginning-of-text token."""
        return self.encode(self.apply_chat(messages, add_generation_prompt), add_special_tokens=False)

    def stream(self) -> TextStream:
        """A new incremental decoder for one generation."""
        return TextStream(self, is_silent=self._is_silent)

    def _is_silent(self, token_id: int) -> bool:
        return token_id in self._special_ids or self._backend.id_to_token(token_id) is None


def load_tokenizer(source: ModelSource) -> Tokenizer:
    """Loads the tokenizer of the model at ``source``. Raises ModelError."""
    if source.kind == "gguf":
        return Tokenizer.from_gguf(GgufFile.open(source.path), source.name)
    return Tokenizer.from_hf(source.path, source.name)


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


def _template_text(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: ``chat_template.jinja``, or else the configuration's; of several named ones, the one
    named default."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _content(entry: Any) -> str | None:
    """The text of a special token, which is a string or an object with 'content'; None if it is neither."""
    text = entry.get("content") if isinstance(entry, Mapping) else entry
    return text if isinstance(text, str) else None
