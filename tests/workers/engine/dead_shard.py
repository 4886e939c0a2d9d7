"""A shard client that can be made dead for every call: frames, store calls and identify.

It wraps in-process shards. ``conftest`` loads this file by path, since test folders are no packages; tests
use the fixture ``mortal``. A shard in a process of its own can be frozen and killed instead: see
``start_process``.
"""

from collections import Counter

from farshore.attention_offload.transport.frames import Transport
from farshore.errors import TransportError

LOCAL = {"close", "break_off"}
"""Calls that only act on the engine's side, so they succeed while the shard is dead."""


class _Life:
    """Whether one shard is dead, and its call counts; shared by all of its clients."""

    def __init__(self):
        self.calls = Counter()
        self.error = None
        self.plan = {}

    def pass_through(self, name):
        self.calls[name] += 1
        action = self.plan.get((name, self.calls[name]))
        if action is not None:
            action()
        if self.error is not None:
            raise self.error()


class _Mortal:
    """Forwards to ``inner``. Its methods are counted by name, and raise while the shard is dead."""

    def __init__(self, inner, life):
        self._inner = inner
        self._life = life

    def __getattr__(self, name):
        value = getattr(self._inner, name)
        if name.startswith("_") or name in LOCAL or not callable(value):
            return value

        def call(*args, **options):
            self._life.pass_through(name)
            return value(*args, **options)

        return call


class MortalClient(_Mortal):
    """A shard client whose shard can die, at once or at a chosen call.

    Its store keeps its memory, like a shard that the network cut off: after :meth:`revive` it still has the
    spans that could not be dropped meanwhile.
    """

    transport = bulk_transport = Transport.TCP  # An engine expects no failures of an IN_PROCESS client.
    native_connection = None

    def __init__(self, client, life=None):
        assert client.native_connection is None, "frames that are sent natively would bypass this wrapper"
        super().__init__(client, life or _Life())
        self.store = _Mortal(client.store, self._life)
        self._second = None

    @property
    def calls(self):
        """Name -> number of calls, including store calls and failed calls."""
        return self._life.calls

    @property
    def dead(self):
        return self._life.error is not None

    def die(self, error=lambda: TransportError("the shard is dead")):
        """Makes every call from now on raise ``error()``."""
        self._life.error = error

    def revive(self):
        self._life.error = None

    def before(self, name, count, action):
        """Calls ``action()`` just before the ``count``-th call of ``name`` from now on.

        ``action`` is ``client.die``, or a function that raises the error of this one call.
        """
        self._life.plan[name, self.calls[name] + count] = action

    def second_connection(self):
        if self._second is None:
            self._second = MortalClient(self._inner.second_connection(), self._life)
        return self._second
