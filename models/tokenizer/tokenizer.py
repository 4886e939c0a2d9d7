"""Converts text to token ids and back.

A thin layer over Hugging Face's ``tokenizers``. A model's folder has its configuration; from a GGUF file it
is assembled from metadata. Called by the gateway, which has no torch. It must not know about weights.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from types import MappingProxyType

import tokenizers

from farshore.errors import InvalidRequest
from farshore.models.tokenizer.stream import TextStream
from farshore.models.tokenizer.token_bytes import TokenBytes
from farshore.text import shortened

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# A UTF-8 character has at most four bytes, and a token at least one.
_END_TOKENS = 4
_MOST_CHARS = 120


class Tokenizer:
    """A model's tokenizer. Immutable, so threads may share it.

    ``eos_ids``: the end tokens that the tokenizer's files name; may be empty. ``special_tokens``: texts by
    role, such as ``bos_token``, for the chat template. ``chat_template``: the Jinja source that came with the
    tokenizer, or several by name, or None.
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
        """``name``: for messages. Raises ModelError if the decoder is unusable."""
        self._backend = backend
        self.name = name
        # A prompt is never cut or padded, whatever lengths the tokenizer was trained or exported with.
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens: Mapping[str, str] = MappingProxyType(dict(special_tokens))
        self.chat_template = chat_template
        added = backend.get_added_tokens_decoder()
        # As decode leaves them out: not special tokens whose text the normaliser changes.
        special = (token for token, entry in added.items() if entry.special and not backend.decode([token]))
        self._tokens = TokenBytes(backend, silent=special, name=name)
        self.eos_ids = eos_ids
        self.vocab_size = backend.get_vocab_size()

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """For modules of this package, and for tests."""
        return self._backend

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of ``text``. A special token written in the text becomes its id.

        ``add_special_tokens``: add the special tokens that the model's tokenizer puts around every text. Pass
        False for the text of a chat template, which has them already. Raises InvalidRequest if the
        tokenizer can't, such as for a character without any token.
        """
        # `encode` keeps the interpreter's lock, for seconds if the text is long; a batch of one releases it.
        try:
            (encoded,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except BaseException as error:
            # tokenizers raises plain Exception, and for damaged tables a panic that is none.
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise InvalidRequest(
                f"{self.name}: its tokenizer can't encode this text: {shortened(str(error), _MOST_CHARS)}"
            ) from error
        return encoded.ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens. Bytes that form no character become U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=True)

    def control_ids(self, stop_ids: Iterable[int] = ()) -> frozenset[int]:
        """Ids of the added tokens that control a conversation: those declared special, and those that end an
        answer (``eos_ids`` and ``stop_ids``). None if this tokenizer reads special tokens as text."""
        if self._backend.encode_special_tokens:
            return frozenset()
        ends = {*self.eos_ids, *stop_ids}
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token for token, entry in added.items() if entry.special or token in ends)

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself: with its blank, bytes that form no character as <0xE2>, and a
        special token as its name. "" for an id outside the vocabulary."""
        return self._tokens.text(token_id)

    def is_silent(self, token_id: int) -> bool:
        """Whether the token adds no text: a special or an unknown one."""
        return self._tokens.is_silent(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token within a text: with its blank; b"" for a special token and for an id outside
        the vocabulary."""
        return self._tokens.following(token_id) or b""

    def prompt_end(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """The last ids of ``prompt`` that have text, at most four: what a stream needs to know about it."""
        visible = (token for token in reversed(prompt) if not self._tokens.is_silent(token))
        return tuple(islice(visible, _END_TOKENS))[::-1]

    def stream(self, prompt_end: Iterable[int] = ()) -> TextStream:
        """A new incremental decoder for one generation. ``prompt_end``: from the method
        of this name; none if the generation is the text's start."""
        return TextStream(self._tokens, prompt_end)
