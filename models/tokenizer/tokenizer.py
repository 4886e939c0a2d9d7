"""Converts text to token ids and back.

A thin layer over Hugging Face's ``tokenizers``. A model's folder has its configuration; from a GGUF file it
is assembled from metadata. Called by the gateway, which has no torch. It must not know about weights.
"""

from collections.abc import Iterable, Mapping, Sequence

import tokenizers

from farshore.models.tokenizer.stream import TextStream

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A model's tokenizer. Immutable, so threads may share it.

    ``eos_ids``: the end tokens that the tokenizer's files name; may be empty. ``chat_template``: Jinja source
    that came with the tokenizer, or several by name. ``special_tokens``: texts by role, such as
    ``bos_token``, for the chat template.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        name: str,
        special_tokens: Mapping[str, str],
        eos_ids: tuple[int, ...],
        chat_template: str | Mapping[str, str] | None,
    ) -> None:
        self._backend = backend
        self.name = name
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token for token, entry in added.items() if entry.special)
        self.eos_ids = eos_ids
        self.vocab_size = backend.get_vocab_size()

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """For modules of this package, and for tests."""
        return self._backend

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of ``text``. A special token written in the text becomes its id.

        ``add_special_tokens``: add the special tokens that the model's tokenizer puts around every text. Pass
        False for the text of a chat template, which has them already.
        """
        # `encode` keeps the interpreter's lock, for seconds if the text is long; a batch of one releases it.
        (encoded,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoded.ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens. Bytes that form no character become U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=True)

    def control_ids(self, stop_ids: Iterable[int] = ()) -> frozenset[int]:
        """Ids of the added tokens that control a conversation: those declared special, and those that end an
        answer (``eos_ids`` and ``stop_ids``)."""
        ends = {*self.eos_ids, *stop_ids}
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token for token, entry in added.items() if entry.special or token in ends)

    def stream(self) -> TextStream:
        """A new incremental decoder for one generation."""
        return TextStream(self, is_silent=self._is_silent)

    def _is_silent(self, token_id: int) -> bool:
        return token_id in self._special_ids or self._backend.id_to_token(token_id) is None
