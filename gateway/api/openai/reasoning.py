"""Separates a model's reasoning, written between ``<think>`` and ``</think>``, from its answer.

Used by ``answers`` for each choice of a chat, with pieces of text of any size. Must not know about tokens.
"""

from typing import NamedTuple

from farshore.gateway.requests.stop_strings import StopStrings

BEGIN, END = "<think>", "</think>"


class Parted(NamedTuple):
    """Pieces of text that are final."""

    reasoning: str
    content: str


class ReasoningParser:
    """``begun``: the prompt ended within the reasoning, as those of some templates do. Blanks behind a
    mark belong to neither text. Text before ``<think>`` is content, and so is all that follows
    ``</think>``: a later mark is text."""

    def __init__(self, *, begun: bool) -> None:
        self._stage = "reasoning" if begun else "start"
        self._mark = StopStrings([END if begun else BEGIN])
        self._blank = True

    def push(self, text: str) -> Parted:
        """Adds text. Returns what is final now; what may be the beginning of a mark is held back."""
        reasoning = content = ""
        while text:
            if self._stage == "content":
                content += self._trimmed(text)
                break
            final, text = self._until_mark(text)
            if self._stage == "start":
                content += final
            else:
                reasoning += self._trimmed(final)
            if self._mark.found:
                self._next_stage()
        return Parted(reasoning, content)

    def finish(self) -> Parted:
        """Ends the text. Returns what was held back."""
        held = "" if self._stage == "content" else self._mark.finish()
        return Parted(self._trimmed(held), "") if self._stage == "reasoning" else Parted("", held)

    def _until_mark(self, text: str) -> tuple[str, str]:
        """(text that is final and before the mark, text behind the mark)."""
        pushed = 0
        final = ""
        for character in text:
            final += self._mark.push(character)
            pushed += 1
            if self._mark.found:
                break
        return final, text[pushed:]

    def _next_stage(self) -> None:
        self._stage = "reasoning" if self._stage == "start" else "content"
        self._mark = StopStrings([END])
        self._blank = True

    def _trimmed(self, text: str) -> str:
        """``text`` without the blanks behind a mark."""
        if self._blank:
            text = text.lstrip()
            self._blank = not text
        return text
