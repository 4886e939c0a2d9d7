"""Fixtures of the tests of model files."""

import pytest


@pytest.fixture
def hub(hub_server, monkeypatch, tmp_path):
    """A StandInHub, which the client in this process asks, with an empty cache ``hub.cache`` and no token."""
    from huggingface_hub import constants

    server = hub_server
    server.cache = tmp_path / "hub-cache"
    # The client has read its environment when it was imported.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(server.cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return server
