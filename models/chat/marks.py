"""Tells control tokens that a template writes from those that a user typed.

A control token's text, such as ``<|im_end|>``, ends a turn. Typed within a message it must stay text. So
before a conversation is rendered, a mark is put into each control token's text within the user's strings,
behind the first character: a private character that occurs nowhere in the conversation. What is a control
token in the rendered text is then the template's, whatever the template cuts or joins. Called by ``template``
and ``process``. It must not know how text is encoded.

Limit: a template that builds a control token from pieces, as ``'<|' + message.role + '|>'``, builds one from
any role that is a control token's name. Roles come from the program that calls, not from its users.
"""

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

_FIRST_MARK, _LAST_MARK = 0xF0000, 0xFFFFD
_MOST_TRIES = 100


class ControlTokens:
    """The texts of a tokenizer's control tokens, prepared for searching. Immutable."""

    def __init__(self, texts: Iterable[str]) -> None:
        """``texts``: of two characters or more."""
        # Of two tokens that begin alike the longer one is found, as tokenizers do.
        longest_first = sorted(set(texts), key=len, reverse=True)
        self.compiled = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.longest = max(map(len, longest_first), default=0)
        self.beginnings = {text[:end] for text in longest_first for end in range(1, len(text))}
        self.ends = {text[start:] for text in longest_first for start in range(1, len(text))}


class Marker:
    """Marks the strings of one conversation. ``used``: whether a mark was needed."""

    def __init__(self, tokens: ControlTokens, *, besides: Iterable[str]) -> None:
        """``besides``: further texts without marks, such as the templates."""
        self._tokens = tokens
        self._besides = list(besides)
        self._mark = ""
        self.used = False

    def mark(self, value: Any) -> Any:
        """``value`` (a string, or lists and mappings of such) with a mark in each control token, in keys
        too. A string that ends or begins with a piece of a control token gets a mark there as well, so that
        it makes none together with its neighbour; identifiers don't."""
        if not self._tokens.longest:
            return value
        self._mark = _unused_character([*self._besides, *_strings(value)])
        return _mapped(value, self._marked)

    def unmarked(self, text: str) -> str:
        """``text`` without marks."""
        return self._unescaped(text).replace(self._mark, "") if self._mark else text

    def unmark(self, text: str, names: Mapping[str, str]) -> str:
        """``text`` without marks, and with the name of each control token that the template wrote."""
        # The marks keep typed tokens from being found, so they go last.
        named = self._tokens.compiled.sub(lambda found: names[found[0]], self._unescaped(text))
        return named.replace(self._mark, "")

    def _unescaped(self, text: str) -> str:
        for escape in _escapes(self._mark):
            text = text.replace(escape, self._mark)
        return text

    def _marked(self, text: str) -> str:
        mark, marked, before = self._mark, text, None
        while marked != before:  # Tokens may overlap, or contain others.
            before = marked
            marked = self._tokens.compiled.sub(lambda found: f"{found[0][0]}{mark}{found[0][1:]}", marked)
        if not text.isidentifier():  # Roles and keys are, and templates compare them.
            # A template may trim the string.
            end = marked.rstrip()
            if self._has_piece(lambda length: end[-length:], len(end), self._tokens.beginnings):
                marked = end + mark + marked[len(end) :]
            start = marked.lstrip()
            if self._has_piece(lambda length: start[:length], len(start), self._tokens.ends):
                marked = marked[: len(marked) - len(start)] + mark + start
        self.used = self.used or len(marked) > len(text)
        return marked

    def _has_piece(self, cut: Callable[[int], str], length: int, pieces: set[str]) -> bool:
        return any(cut(size) in pieces for size in range(1, min(length + 1, self._tokens.longest)))


def _escapes(mark: str) -> tuple[str, str]:
    """What templates make of ``mark`` by ``tojson(ensure_ascii=true)``, and by printing a list or mapping."""
    return json.dumps(mark)[1:-1], repr(mark)[1:-1]


def _unused_character(texts: list[str]) -> str:
    """A private character that occurs in none of ``texts``, neither as it is nor escaped. It is random, so
    that no text can make the search long."""
    for _ in range(_MOST_TRIES):
        mark = chr(random.randint(_FIRST_MARK, _LAST_MARK))
        if not any(form in text for form in (mark, *_escapes(mark)) for text in texts):
            return mark
    raise ValueError("the conversation has too many different private characters")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    return value
