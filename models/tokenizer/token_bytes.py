"""The bytes that each token adds to a text, as the tokenizer's decoder would write them.

A decoder of ``tokenizers`` works on a whole list of ids. A stream needs the text of one more token, whatever
came before, and a list of alternatives needs the text of one token alone, with its blank. So this module
reads the decoder's settings once and applies them token by token. Created by ``Tokenizer``; called by it and
by ``stream``. It must not know about files.
"""

import codecs
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

from farshore.errors import ModelError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_EACH_BYTE, _HEX = "farshore.each_byte", "farshore.hex"
_SUPPORTED = "ByteLevel, Metaspace, and sequences of Replace, ByteFallback, Fuse and Strip"


def _undecodable(error: UnicodeError) -> bytes:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return error.object[error.start : error.end]


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    """A replacement character for each byte, as byte fallback writes them."""
    return "\N{REPLACEMENT CHARACTER}" * len(_undecodable(error)), error.end


def _hex(error: UnicodeError) -> tuple[str, int]:
    return "".join(f"<0x{byte:02X}>" for byte in _undecodable(error)), error.end


codecs.register_error(_EACH_BYTE, _each_byte)
codecs.register_error(_HEX, _hex)


def _byte_level_characters() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters are their own bytes; the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_level_characters()


@dataclass(slots=True)
class _Rule:
    """A decoder's settings. ``replacements``: done in each piece, in order. ``first_drops``: a text that is
    left out of the first piece. ``strips``: a character that is left out at the text's start, once.
    ``separator``: text between pieces."""

    byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    first_drops: str = ""
    strips: str = ""
    separator: bytes = b""


class TokenBytes:
    """The bytes of tokens in a text. Threads may share it.

    ``strips``: a character that the decoder leaves out at the start of a text, once; "" if none.
    ``errors``: how undecodable bytes become text, for ``bytes.decode``.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, silent: Iterable[int], name: str) -> None:
        """``silent``: ids of special tokens. ``name``: the model's, for messages. Raises ModelError if the
        decoder is of an unsupported kind."""
        self._piece = backend.id_to_token
        self._silent = frozenset(silent)
        self._rule = _rule(backend, name)
        self._known: dict[int, bytes | None] = {}
        self.strips = self._rule.strips
        self.errors = _EACH_BYTE if self._rule.byte_fallback else "replace"

    def is_silent(self, token_id: int) -> bool:
        """Whether the token adds no text: a special or an unknown one."""
        return self.following(token_id) is None

    def first(self, token_id: int) -> bytes | None:
        """The token's bytes at the start of a text, before ``strips``; None if it is silent."""
        if not self._rule.first_drops or self.following(token_id) is None:
            return self._written(token_id)
        return self._bytes(self._piece(token_id).replace(self._rule.first_drops, ""))

    def following(self, token_id: int) -> bytes | None:
        """The token's bytes after another token of the text; None if it is silent."""
        try:
            return self._known[token_id]
        except KeyError:
            written = self._written(token_id)
            self._known[token_id] = None if written is None else self._rule.separator + written
            return self._known[token_id]

    def text(self, token_id: int) -> str:
        """The token's own text, with its blank. Bytes that form no character are written as <0xE2>; a special
        token is its name; an unknown id is ""."""
        if token_id in self._silent:
            return self._piece(token_id) or ""
        return (self._written(token_id) or b"").decode(errors=_HEX)

    def _written(self, token_id: int) -> bytes | None:
        piece = self._piece(token_id)
        return None if piece is None or token_id in self._silent else self._bytes(piece)

    def _bytes(self, piece: str) -> bytes:
        if self._rule.byte_level:
            try:
                return bytes(_BYTE_OF[character] for character in piece)
            except KeyError:
                return piece.encode()  # An added token, written as it is.
        for old, new in self._rule.replacements:
            piece = piece.replace(old, new)
        if self._rule.byte_fallback and (byte := _BYTE_PIECE.fullmatch(piece)):
            return bytes.fromhex(byte[1])
        return piece.encode()


def _rule(backend: tokenizers.Tokenizer, name: str) -> _Rule:
    rule = _Rule()
    if backend.decoder is None:
        rule.separator = b" "
        return rule
    steps = list(_flat(json.loads(backend.decoder.__getstate__())))
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        rule.byte_level = True
    elif kinds == ["Metaspace"]:
        blank = steps[0]["replacement"]
        rule.replacements = ((blank, " "),)
        rule.first_drops = "" if steps[0]["prepend_scheme"] == "never" else blank
    elif not _read_sequence(rule, steps):
        raise ModelError(f"{name}: decoder {'+'.join(kinds)} is unsupported; supported: {_SUPPORTED}")
    return rule


def _flat(step: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    if step["type"] != "Sequence":
        yield step
        return
    for inner in step["decoders"]:
        yield from _flat(inner)


def _read_sequence(rule: _Rule, steps: list[Mapping[str, Any]]) -> bool:
    """Fills ``rule`` from Replace*, ByteFallback?, Fuse?, Strip?. False if the steps are others."""
    rest = list(steps)
    while rest and rest[0]["type"] == "Replace":
        pattern = rest[0]["pattern"].get("String")
        if not pattern:
            return False
        rule.replacements += ((pattern, rest.pop(0)["content"]),)
    if rest and rest[0]["type"] == "ByteFallback":
        rest.pop(0)
        rule.byte_fallback = True
    if rest and rest[0]["type"] == "Fuse":
        rest.pop(0)
        if rest and rest[0]["type"] == "Strip" and (rest[0]["start"], rest[0]["stop"]) == (1, 0):
            rule.strips = rest.pop(0)["content"]
    return not rest
