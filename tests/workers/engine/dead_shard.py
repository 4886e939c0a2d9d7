"""A shard that is dead for every call: frames, the store's calls, and asking what it is.

For engines over in-process shards. ``conftest`` loads it by path, since test folders are no packages; take it
by the fixture ``mortal``. A shard that is a process can be frozen, thawed and killed: see ``start_process``.
"""

from collections import Counter

from farshore.attention_offload.transport.frames import Transport
from farshore.errors import TransportError

LOCAL = {"close", "break_off"}
"""Calls that only end something at the engine's end, so the shard's death makes no difference to them."""


class _Life:
    """One shard's, whatever it is reached by."""

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
    """Attributes of ``inner``; its methods raise while the shard is dead, and are counted by name."""

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
    """A peer that can die: at once, or in the middle of whatever a test waits for.

    The store behind it lives on, as the memory of a shard does that was cut off: after :meth:`revive` it has
    what could not be dropped meanwhile.
    """

    transport = bulk_transport = Transport.TCP  # An engine takes an in-process peer for one that never fails.
    native_connection = None

    def __init__(self, client, life=None):
        assert client.native_connection is None, "frames that are sent natively would pass this by"
        super().__init__(client, life or _Life())
        self.store = _Mortal(client.store, self._life)
        self._second = None

    @property
    def calls(self):
        """How often each call was made, the store's and those that failed included."""
        return self._life.calls

    @property
    def dead(self):
        return self._life.error is not None

    def die(self, error=lambda: TransportError("the shard is dead")):
        """From now on every call raises what ``error()`` makes."""
        self._life.error = error

    def revive(self):
        self._life.error = None

    def before(self, name, count, action):
        """``action()`` runs just before the ``count``-th call of ``name`` from now on: ``peer.die``, or a
        function that raises what this one call is to fail with."""
        self._life.plan[name, self.calls[name] + count] = action

    def second_connection(self):
        if self._second is None:
            self._second = MortalClient(self._inner.second_connection(), self._life)
        return self._second
