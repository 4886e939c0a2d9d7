"""The HTTP listener when uvicorn fails."""

import asyncio

import httpx2
import pytest
import uvicorn

from farshore.errors import Internal, StartupError
from farshore.gateway.api.http import HttpListener


async def answer(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def ticks(monkeypatch):
    """fail(error): the next turn of the main loop of uvicorn raises it."""
    on_tick, errors = uvicorn.Server.on_tick, []

    async def tick(server, counter):
        if errors:
            raise errors.pop()
        return await on_tick(server, counter)

    monkeypatch.setattr(uvicorn.Server, "on_tick", tick)
    return errors.append


def test_a_gateway_whose_http_fails_says_so(start, loop_thread, ticks):
    gateway = start(http="127.0.0.1:0").gateway
    failing = asyncio.run_coroutine_threadsafe(gateway.await_failure(), loop_thread.loop)
    url = f"http://{gateway.http_address}/health"
    assert httpx2.get(url).status_code == 200 and not failing.done()
    ticks(KeyError("dreaming"))
    with pytest.raises(Internal, match="the gateway's HTTP ended: KeyError"):
        failing.result(60)
    loop_thread.run(gateway.stop())
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(url)


def test_http_that_cannot_start_is_an_error(monkeypatch):
    async def startup(server, sockets=None):
        raise OSError("no room")

    monkeypatch.setattr(uvicorn.Server, "startup", startup)

    async def run():
        listener = HttpListener(answer, listen="127.0.0.1:0", most_connections=1)
        with pytest.raises(StartupError, match="HTTP can't be served") as caught:
            await listener.start()
        assert isinstance(caught.value.__cause__, OSError)
        await listener.stop(1.0)

    asyncio.run(run())
