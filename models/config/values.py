"""Checks of single values in a model's configuration files. Called by ``hf``, ``gguf`` and
``rope_parameters``.

Messages begin with the model's name and show at most 80 characters of a wrong value.
"""

from typing import Any

from farshore.errors import ModelError


def positive(value: Any) -> bool:
    return type(value) is int and value > 0


def number(value: Any, what: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ModelError(f"{name}: {what} must be a number, not {value!r:.80}")
    return float(value)


def boolean(value: Any, what: str, name: str) -> bool:
    if not isinstance(value, bool):
        raise ModelError(f"{name}: {what} must be true or false, not {value!r:.80}")
    return value
