"""The SDK: the blocking :class:`Client` and :class:`AsyncClient`, which have the same calls."""

from farshore.client.sdk.aio import AsyncClient
from farshore.client.sdk.client import Client

__all__ = ["AsyncClient", "Client"]
