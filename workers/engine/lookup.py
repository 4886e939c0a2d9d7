"""What may come next, guessed from the sequence's own tokens (prompt lookup decoding; A. Saxena, 2023).

If the last few tokens have stood together before, what followed them then may follow again: true of quotes,
code, and answers that repeat their prompt. A wrong guess costs rows of a step, never a wrong token.
"""

from array import array
from collections.abc import Sequence

NGRAMS = (4, 3, 2)
"""Tokens that must match, the most telling first."""


class Lookup:
    """Of one sequence. Proposes at most ``most`` tokens, fewer while it is wrong: twice as many after a step
    that took all, half as many after one that took none."""

    def __init__(self, most: int) -> None:
        self._most = self._now = most
        self._tokens = bytearray()

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """What followed the last time that ``tokens`` ended as now: up to ``most`` tokens, or none.
        Since the last call ``tokens`` may have grown, or been cut back: not cut and then grown again."""
        del self._tokens[4 * len(tokens) :]
        self._tokens += array("I", tokens[len(self._tokens) // 4 :]).tobytes()
        most = min(most, self._now)
        if most < 1:
            return []
        for ngram in NGRAMS:
            behind = self._find(4 * ngram)
            if behind is not None:
                return array("I", bytes(self._tokens[behind : behind + 4 * most])).tolist()
        return []

    def judge(self, proposed: int, taken: int) -> None:
        """How many of the last proposal's tokens were right."""
        if taken == proposed:
            self._now = min(2 * self._now, self._most)
        elif not taken:
            self._now = max(1, self._now // 2)

    def _find(self, size: int) -> int | None:
        """Where the bytes behind the newest earlier copy of the last ``size`` begin."""
        pattern, end = self._tokens[-size:], len(self._tokens) - 4
        if len(pattern) < size:
            return None
        at = self._tokens.rfind(pattern, 0, end)
        while at % 4:  # between two tokens; -1 % 4 is 3
            if at < 0:
                return None
            at = self._tokens.rfind(pattern, 0, at + size - 1)
        return at + size
