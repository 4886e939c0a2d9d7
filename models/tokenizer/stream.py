"""Decodes generated tokens to text one by one, without splitting a character.

A token may end inside a UTF-8 character, and its text may depend on the token before it. So each push decodes
a short window of recent tokens and returns the text that is new. Created by ``Tokenizer.stream``; called by
the gateway, which streams the text to clients. It must not know where tokens come from.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# A UTF-8 character has at most four bytes, so a longer run that can't be decoded is not one unfinished
# character.
_LONGEST_RUN_TOKENS = 8


class TokenDecoder(Protocol):
    """The part of a tokenizer that a stream calls."""

    def decode(self, ids: Sequence[int]) -> str: ...


class TextStream:
    """The text of one generation. Not thread-safe.

    The results of all pushes and of ``finish``, joined, equal ``decode`` of all ids; exactly so for
    byte-level tokenizers. A push decodes only the tokens of the last returned text and those after it.
    """

    def __init__(self, tokenizer: TokenDecoder, *, is_silent: Callable[[int], bool]) -> None:
        """``is_silent``: true for ids without text (special or unknown ones), which the stream ignores."""
        self._decode = tokenizer.decode
        self._is_silent = is_silent
        # [context | pending]: the context's text was returned already; it only affects how the pending tokens
        # are decoded.
        self._window: list[int] = []
        self._context_tokens = 0
        self._context_text = ""

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is unfinished."""
        if self._is_silent(token_id):
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if not text.endswith(_UNFINISHED):
            return self._take_new(text)
        pending_tokens = len(self._window) - self._context_tokens
        if pending_tokens % _LONGEST_RUN_TOKENS == 0:
            return self._take_settled(text)
        return ""

    def finish(self) -> str:
        """The remaining text: bytes of an unfinished character, as replacement characters. Resets the
        stream."""
        text = self._decode(self._window)[len(self._context_text) :]
        self._window, self._context_tokens, self._context_text = [], 0, ""
        return text

    def _take_new(self, text: str) -> str:
        """Returns the text after the context. The pending tokens become the context."""
        new = text[len(self._context_text) :]
        self._window = self._window[self._context_tokens :]
        self._context_tokens = len(self._window)
        self._context_text = self._decode(self._window)
        return new

    def _take_settled(self, text: str) -> str:
        """Returns a long undecodable run except for its end, which a later token may still change.

        If the two halves of a cut decode to the same text as the whole, later tokens change only the second
        one.
        """
        for cut in range(len(self._window) - 1, self._context_tokens, -1):
            settled = self._decode(self._window[:cut])
            if settled + self._decode(self._window[cut:]) == text:
                new = settled[len(self._context_text) :]
                self._window, self._context_tokens, self._context_text = self._window[cut:], 0, ""
                return new
        return ""
