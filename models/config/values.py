"""Checks of single values in a model's configuration files. Called by ``hf`` and ``gguf``."""

import json
from typing import Any

from farshore.errors import ModelError


def merged(*sources: Any) -> tuple[int, ...]:
    """Joins ids from several sources, each None, one id or a list of ids. Removes repeats and keeps the
    order."""
    ids: list[int] = []
    for source in sources:
        ids += [] if source is None else source if isinstance(source, list) else [source]
    return tuple(dict.fromkeys(_hashable(token) for token in ids))


def _hashable(value: Any) -> Any:
    """``value``, or its JSON text if it can't be a dict key, so that the check's message can show it."""
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def positive(value: Any) -> bool:
    return type(value) is int and value > 0


def number(value: Any, what: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ModelError(f"{name}: {what} must be a number, not {value!r}")
    return float(value)
