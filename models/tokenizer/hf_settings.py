"""Reads the settings beside a Hugging Face tokenizer, with the precedence that transformers 5 gives them.

``tokenizer_config.json`` and, where that file lists no added tokens, ``special_tokens_map.json`` and
``added_tokens.json``. Called by ``hf``. It must not know how a tokenizer is built.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import tokenizers
from tokenizers import AddedToken

from farshore.errors import ModelError
from farshore.models.files.source import read_json
from farshore.models.tokenizer.tokenizer import SPECIAL

Token = str | AddedToken
_EXTRA, _OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"


@dataclass(slots=True)
class HfSettings:
    """``options``: the entries of ``tokenizer_config.json`` that are not named here, such as ``legacy``.
    ``roles``: special tokens by role; None where a file says null. ``own_roles``: of roles that only this
    model has; ``typed_own_roles``: those that are given as objects or by an older file, and count
    less. ``extra``: special tokens without a role; None if ``tokenizer_config.json`` has no list.
    ``old_extra``: those of an older file, which count if ``extra`` is None. ``added``: added tokens by id."""

    options: dict[str, Any]
    roles: dict[str, Token | None] = field(default_factory=dict)
    own_roles: dict[str, Token] = field(default_factory=dict)
    typed_own_roles: dict[str, Token] = field(default_factory=dict)
    extra: list[Token] | None = None
    old_extra: list[Token] = field(default_factory=list)
    added: dict[int, AddedToken] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, backend: tokenizers.Tokenizer | None) -> "HfSettings":
        """``backend``: from ``tokenizer.json``, if there is one; its added tokens count where
        ``tokenizer_config.json`` lists none. Raises ModelError."""
        path = folder / "tokenizer_config.json"
        options = read_json(path) if path.is_file() else {}
        settings = cls(options)
        if _OLD_EXTRA in options and not options.get(_EXTRA):
            options[_EXTRA] = options.pop(_OLD_EXTRA)
        settings._take(options, path)
        listed = options.pop("added_tokens_decoder", None)
        if listed is not None:
            settings._take_listed(listed, path)
        else:
            settings._take_old_files(folder, backend)
        by_text = {token.content: token for token in settings.added.values()}
        for role, token in settings.roles.items():
            settings.roles[role] = by_text.get(_text(token), token)
        return settings

    def named(self, defaults: Mapping[str, Token | None]) -> dict[str, Token]:
        """Special tokens by role, standard roles first, with a class's ``defaults`` where no file names the
        role."""
        standard = {role: self.roles.get(role, defaults.get(role)) for role in SPECIAL}
        every = {**standard, **self.typed_own_roles, **self.own_roles}
        return {role: token for role, token in every.items() if token is not None}

    def _take(self, entries: dict[str, Any], path: Path, **flags: bool) -> None:
        """Moves the special tokens out of ``entries``, over those of a file read before. ``flags``: of tokens
        that are given as objects."""
        is_old = bool(flags)
        for key in list(entries):
            value = entries[key]
            if key in SPECIAL:
                self.roles[key] = None if value is None else _token(value, key, path, **flags)
                del entries[key]
            elif key.endswith("_token") and isinstance(value, str | Mapping):
                own = self.typed_own_roles if is_old or isinstance(value, Mapping) else self.own_roles
                own[key] = _token(value, key, path, **flags)
                del entries[key]
        if isinstance(entries.get(_EXTRA), Mapping):
            for role, value in entries.pop(_EXTRA).items():
                self.own_roles[role] = _token(value, role, path, **flags)
        elif _EXTRA in entries:
            tokens = _tokens(entries.pop(_EXTRA), _EXTRA, path, **flags)
            known = self.extra or []
            self.extra = known + [token for token in tokens if token not in known]
        if _OLD_EXTRA in entries:
            self.old_extra = _tokens(entries.pop(_OLD_EXTRA), _OLD_EXTRA, path, **flags)

    def _take_listed(self, listed: Any, path: Path) -> None:
        key = "added_tokens_decoder"
        if not isinstance(listed, Mapping):
            _refuse(key, path)
        for token_id, value in listed.items():
            if not token_id.isdecimal() or not isinstance(token := _token(value, key, path), AddedToken):
                _refuse(key, path)
            self.added[int(token_id)] = token

    def _take_old_files(self, folder: Path, backend: tokenizers.Tokenizer | None) -> None:
        """What transformers before 4.34 wrote."""
        path = folder / "special_tokens_map.json"
        if path.is_file():
            self._take(read_json(path), path, special=True)
        path = folder / "added_tokens.json"
        if path.is_file():
            special = {_text(token) for token in (*self.roles.values(), *(self.extra or []))}
            for text, token_id in read_json(path).items():
                if type(token_id) is not int:
                    _refuse(text, path)
                self.added[token_id] = AddedToken(
                    text, normalized=text not in special, special=text in special
                )
        if backend is not None:
            self.added |= backend.get_added_tokens_decoder()


def _tokens(values: Any, key: str, path: Path, **flags: bool) -> list[Token]:
    if values is not None and not isinstance(values, list):
        _refuse(key, path)
    return [_token(value, key, path, **flags) for value in values or []]


def _token(value: Any, key: str, path: Path, **flags: bool) -> Token:
    """A text, or an AddedToken from an object and ``flags``."""
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
        _refuse(key, path)
    try:
        return AddedToken(**{name: entry for name, entry in value.items() if name != "__type"} | flags)
    except TypeError:
        _refuse(key, path)


def _text(token: Token | None) -> str:
    return token.content if isinstance(token, AddedToken) else token or ""


def _refuse(key: str, path: Path) -> NoReturn:
    raise ModelError(f"{path}: {key!r} doesn't name tokens by texts or objects; correct it")
