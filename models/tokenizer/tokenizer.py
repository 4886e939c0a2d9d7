"""Converts text to token ids and back, and chat messages to a prompt.

A thin layer over Hugging Face's ``tokenizers``. A model's folder has its configuration; from a GGUF file it
is assembled from metadata. Called by the gateway, which has no torch. It must not know about weights.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from farshore.errors import ModelError
from farshore.models.chat.template import ChatTemplate
from farshore.models.tokenizer.stream import TextStream

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


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

    def with_chat_template(self, source: str, *, where: str) -> "Tokenizer":
        """The same tokenizer with another chat template. ``where``: its origin, for messages. Raises
        ModelError."""
        changed = copy.copy(self)
        changed._chat = ChatTemplate(source, where=where)
        return changed

    def stream(self) -> TextStream:
        """A new incremental decoder for one generation."""
        return TextStream(self, is_silent=self._is_silent)

    def _is_silent(self, token_id: int) -> bool:
        return token_id in self._special_ids or self._backend.id_to_token(token_id) is None
