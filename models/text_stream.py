"""Text as it is generated: token by token, and never half a character.

A token may end inside a UTF-8 character, and how a token reads can depend on the one before it. So each push
decodes a short window of recent tokens and hands out what is new in it. Called by whatever streams to a
client. Must not know where tokens come from.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# A UTF-8 character has at most four bytes, so longer undecodable runs aren't one character still to come.
_LONGEST_RUN_TOKENS = 8


class Decoder(Protocol):
    """What a stream needs of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str: ...


class TextStream:
    """One generation's text. Not thread-safe.

    All pushes and ``finish`` joined equal ``decode`` of all ids, for byte-level tokenizers exactly. A push
    decodes only the tokens since the last but one piece of text.
    """

    def __init__(self, tokenizer: Decoder, *, is_silent: Callable[[int], bool]) -> None:
        """``is_silent``: ids without text of their own (special or unknown ones), left out of the window."""
        self._decode = tokenizer.decode
        self._is_silent = is_silent
        # [context | pending]: the context was handed out and only lends the pending tokens a neighbour.
        self._window: list[int] = []
        self._context_tokens = 0
        self._context_text = ""

    def push(self, token_id: int) -> str:
        """The text that this token completes; often "" inside a character of several tokens."""
        if self._is_silent(token_id):
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if not text.endswith(_UNFINISHED):
            return self._hand_out(text)
        pending_tokens = len(self._window) - self._context_tokens
        if pending_tokens % _LONGEST_RUN_TOKENS == 0:
            return self._hand_out_settled(text)
        return ""

    def finish(self) -> str:
        """What is left: bytes that never became a character, as replacement characters. Resets the stream."""
        text = self._decode(self._window)[len(self._context_text) :]
        self._window, self._context_tokens, self._context_text = [], 0, ""
        return text

    def _hand_out(self, text: str) -> str:
        new = text[len(self._context_text) :]
        self._window = self._window[self._context_tokens :]
        self._context_tokens = len(self._window)
        self._context_text = self._decode(self._window)
        return new

    def _hand_out_settled(self, text: str) -> str:
        """Hand out a long undecodable run but for its end.

        Where the run reads the same cut in two as in one piece, later tokens change only the second part.
        """
        for cut in range(len(self._window) - 1, self._context_tokens, -1):
            settled = self._decode(self._window[:cut])
            if settled + self._decode(self._window[cut:]) == text:
                new = settled[len(self._context_text) :]
                self._window, self._context_tokens, self._context_text = self._window[cut:], 0, ""
                return new
        return ""
