"""Guesses the next tokens of a sequence from its own text (prompt lookup decoding; A. Saxena, 2023).

If the last few tokens occurred together before, the tokens that followed them may follow again. This holds
for quotations, code, and answers that repeat their prompt. A wrong guess costs rows of a step, never a wrong
token. Called by ``decode.step_entry``. It must not know how guesses are verified.
"""

from array import array
from collections.abc import Sequence

NGRAMS = (4, 3, 2)
"""Lengths of the match, in tokens, in the order in which they are tried. A longer match predicts better."""


class PromptLookup:
    """Proposes tokens for one sequence. Not thread-safe.

    ``most`` bounds the number of proposed tokens. The current bound doubles after a step that accepted all
    guesses, and halves, down to 1, after a step that accepted none.
    """

    def __init__(self, most: int) -> None:
        self._most = self._bound = most
        self._tokens = bytearray()

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Returns up to ``most`` tokens that followed the newest earlier copy of the end of ``tokens``.

        Returns [] if there is no such copy. Between two calls ``tokens`` may be extended or truncated, but
        not truncated and then extended: the change is detected by the length alone.
        """
        del self._tokens[4 * len(tokens) :]
        self._tokens += array("I", tokens[len(self._tokens) // 4 :]).tobytes()
        most = min(most, self._bound)
        if most < 1:
            return []
        for ngram in NGRAMS:
            following = self._find_continuation(4 * ngram)
            if following is not None:
                return array("I", bytes(self._tokens[following : following + 4 * most])).tolist()
        return []

    def record(self, proposed: int, accepted: int) -> None:
        """Adapts the bound to the last proposal: ``accepted`` of ``proposed`` tokens were right."""
        if accepted == proposed:
            self._bound = min(2 * self._bound, self._most)
        elif not accepted:
            self._bound = max(1, self._bound // 2)

    def _find_continuation(self, size: int) -> int | None:
        """Finds the newest earlier copy of the last ``size`` bytes; returns the byte offset just after it."""
        pattern, end = self._tokens[-size:], len(self._tokens) - 4
        if len(pattern) < size:
            return None
        offset = self._tokens.rfind(pattern, 0, end)
        while offset % 4:  # Not on a token's boundary, or not found: -1 % 4 is 3.
            if offset < 0:
                return None
            offset = self._tokens.rfind(pattern, 0, offset + size - 1)
        return offset + size
