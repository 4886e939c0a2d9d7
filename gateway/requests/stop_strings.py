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
        self._stops = [_StopString(stop) for stop in stops]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What is certainly part of the text, now that ``text`` has come. Nothing more once one is found."""
        if self.found:
            return ""
        for stop in self._stops:
            stop.push(text)
        text = self._held + text
        starts = [at for stop in self._stops if (at := text.find(stop.text)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        held = max((stop.matched for stop in self._stops), default=0)
        certain = len(text) - held
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was held back and became no stop string."""
        held, self._held = self._held, ""
        return held


class _StopString:
    """``matched``: the length of its longest beginning that the text ends with (Knuth, Morris and Pratt):
    one step for each character, whatever the stop string."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        # By the length of a beginning: that of the next shorter one that it ends with.
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
