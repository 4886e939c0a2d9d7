"""Text that ends before the first stop string, handed out as early as that is certain.

Fed by ``completion`` with pieces of any size. Must not know about tokens.
"""

from collections.abc import Sequence


class StopStrings:
    """One completion's text. What may be the beginning of a stop string is held back, and nothing else::

    stop "END"   push "the E" → "the "   push "N" → ""   push "ough" → "ENough"   push " END." → " "
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """``stops``: none of them empty; perhaps none at all."""
        self._stops = tuple(stops)
        # Every beginning of a stop string, but for the whole of it.
        self._beginnings = {stop[:end] for stop in stops for end in range(1, len(stop))}
        self._longest = max((len(stop) for stop in stops), default=1) - 1
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What is certainly part of the text, now that ``text`` has come. Nothing more once one is found."""
        if self.found:
            return ""
        text = self._held + text
        ends = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)]
        self._held = self._beginning_at_end_of(text)
        return text[: len(text) - len(self._held)]

    def finish(self) -> str:
        """What was held back and became no stop string."""
        held, self._held = self._held, ""
        return held

    def _beginning_at_end_of(self, text: str) -> str:
        for length in range(min(self._longest, len(text)), 0, -1):
            if text[-length:] in self._beginnings:
                return text[-length:]
        return ""
