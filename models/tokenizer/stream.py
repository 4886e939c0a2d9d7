"""Decodes generated tokens to text one by one, without splitting a character.

Created by ``Tokenizer.stream``; called by the gateway, which streams the text to clients. It must not know
where tokens come from.
"""

import codecs
from collections.abc import Iterable

from farshore.models.tokenizer.token_bytes import TokenBytes

_UTF_8 = codecs.getincrementaldecoder("utf-8")


class TextStream:
    """The text of one generation. Not thread-safe.

    The results of all pushes and of ``finish``, joined, are the text by which the generation prolongs its
    prompt's text: with an empty prompt, ``decode`` of all ids. So a blank that decoders strip from the start
    of a text is kept after a prompt. Bytes that form no character become U+FFFD, as the tokenizer's decoder
    writes them, with one exception: byte-fallback decoders also replace the whole characters next to such
    bytes, which a stream has returned already.
    """

    def __init__(self, tokens: TokenBytes, prompt_end: Iterable[int]) -> None:
        """``prompt_end``: the last ids of the prompt that have text (``Tokenizer.prompt_end``); none if the
        generation is the text's start. An unfinished character at their end is completed by the stream."""
        self._tokens = tokens
        self._utf_8 = _UTF_8(tokens.errors)
        self._at_start = True
        self._strips = tokens.strips
        for token_id in prompt_end:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is unfinished, and for special tokens."""
        tokens = self._tokens
        added = tokens.first(token_id) if self._at_start else tokens.following(token_id)
        if added is None:
            return ""
        self._at_start = False
        return self._stripped(self._utf_8.decode(added))

    def finish(self) -> str:
        """The remaining text: bytes of an unfinished character, as replacement characters."""
        return self._stripped(self._utf_8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if self._strips and text:
            text = text.removeprefix(self._strips)
            self._strips = ""
        return text
