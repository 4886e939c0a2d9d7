"""AsyncClient behind the calls of Client, so that one test holds for both.

Loaded by the fixture ``sdk`` of ``tests/conftest.py``. Runs on the session's event loop in a thread: grpc.aio
logs errors if several loops of a process use it.
"""

import inspect

from farshore.client.sdk.aio import AsyncClient, AsyncStream


class BlockingClient:
    """Has the attributes of an AsyncClient. Calls block, streams are iterators."""

    def __init__(self, loop_thread, *arguments, **options):
        self._run = loop_thread.run
        self._client = AsyncClient(*arguments, **options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __getattr__(self, name):
        return _blocking(self._client, name, self._run)


class BlockingStream:
    """Has the attributes of an AsyncStream."""

    def __init__(self, stream, run):
        self.stream = stream
        self._run = run

    def __iter__(self):
        return self

    def __next__(self):
        async def step():
            return await anext(self.stream, None)

        value = self._run(step())
        if value is None:
            raise StopIteration
        return value

    def __getattr__(self, name):
        return _blocking(self.stream, name, self._run)


def _blocking(owner, name, run):
    async def read():
        return getattr(owner, name)

    # On the loop: some of a client's attributes make its channels.
    found = run(read())
    if not inspect.ismethod(found):
        return found

    async def call(*arguments, **options):
        result = found(*arguments, **options)
        return await result if inspect.isawaitable(result) else result

    def blocking(*arguments, **options):
        result = run(call(*arguments, **options))
        return BlockingStream(result, run) if isinstance(result, AsyncStream) else result

    return blocking
