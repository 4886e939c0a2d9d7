"""A gateway with its HTTP listener, and OpenAI's own client of it."""

import openai
import pytest


@pytest.fixture
def http(start):
    """A Harness whose gateway has an HTTP listener."""
    return start(http="127.0.0.1:0")


@pytest.fixture
def base_url(http):
    return f"http://{http.gateway.http_address}"


@pytest.fixture
def client(base_url):
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=30) as made:
        yield made
