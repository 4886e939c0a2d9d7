"""Cuts a text before the first stop string, and releases text as soon as it can't belong to one.

Called by ``completion`` with pieces of any size. Must not know about tokens.
"""

from collections.abc import Sequence


class StopStrings:
    """The text of one completion. Holds back only text that may be the beginning of a stop string::

    stop "END"   push "the E" → "the "   push "N" → ""   push "ough" → "ENough"   push " END." → " "
    """

    def __init__(self, stops: Sequence[str], *, included: bool = False) -> None:
        """``stops`` may be empty; no string in it may. ``included``: cut behind the stop string instead."""
        self._included = included
        self._stops = [_StopString(stop) for stop in stops]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Adds ``text``. Returns the text that is now final; "" once a stop string has been found."""
        if self.found:
            return ""
        if not self._stops:
            return text
        for stop in self._stops:
            stop.push(text)
        text = self._held + text
        starts = [(start, stop.text) for stop in self._stops if (start := text.find(stop.text)) >= 0]
        if starts:
            self.found, self._held = True, ""
            # Of those that begin at one place, the shortest comes first in the text.
            start, stop_text = min(starts, key=lambda found: (found[0], len(found[1])))
            return text[: start + len(stop_text) * self._included]
        final = len(text) - max((stop.matched for stop in self._stops), default=0)
        self._held = text[final:]
        return text[:final]

    def finish(self) -> str:
        """Ends the text. Returns the text that was held back."""
        held, self._held = self._held, ""
        return held


class _StopString:
    """Matches one stop string with the algorithm of Knuth, Morris and Pratt, in amortised constant time per
    character. ``matched``: the length of the longest prefix of the stop string that ends the pushed text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        # KMP's failure function: for each prefix length, the length of the longest proper prefix that is also
        # a suffix of that prefix.
        self._shorter = [0, 0]
        for character in text[1:]:
            self._shorter.append(self._longer(self._shorter[-1], character))

    def push(self, text: str) -> None:
        for character in text:
            self.matched = self._longer(self.matched, character)

    def _longer(self, matched: int, character: str) -> int:
        if matched == len(self.text):
            matched = self._shorter[matched]
        while matched and self.text[matched] != character:
            matched = self._shorter[matched]
        return matched + (self.text[matched] == character)
