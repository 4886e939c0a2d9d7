"""The identities that cross floors. All are opaque: compare them, never parse them."""

from typing import NewType

SequenceId = NewType("SequenceId", str)
"""One request; its n continuations are (sequence, choice)."""

WorkerId = NewType("WorkerId", str)
"""One worker in one incarnation: a restarted worker has a new id, so no span id is ever reused."""

SpanId = NewType("SpanId", str)
"""One span on one worker: ``<worker id>/<serial>``."""

Epoch = NewType("Epoch", int)
"""Ownership term of a sequence; every claim gets a greater one. Older epochs write nothing."""
