"""Farshore: a long-context LLM serving cluster whose attention runs where the memory is.

``from farshore import Client, AsyncClient`` gives the SDK. These names are imported when they are first
used, so that importing a module of Farshore brings no other one."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from farshore.client.sdk import AsyncClient as AsyncClient
    from farshore.client.sdk import Client as Client

__version__ = "0.1.0"

_SDK = ("AsyncClient", "Client")


def __getattr__(name: str) -> object:
    if name in _SDK:
        return getattr(import_module("farshore.client.sdk"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SDK})
