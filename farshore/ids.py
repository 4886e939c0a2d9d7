"""The identities that cross floors. All are opaque: compare them, never parse them."""

from typing import NewType

SequenceId = NewType("SequenceId", str)
"""One request; its n continuations are (sequence, choice)."""

WorkerId = NewType("WorkerId", str)
"""One worker; the controller gives a restarted one a new id."""

SpanId = NewType("SpanId", str)
"""One span in one store: ``<worker id>/<incarnation of the store>/<serial>``, so that none is ever used
again."""

Epoch = NewType("Epoch", int)
"""Ownership term of a sequence; every claim gets a greater one. Older epochs write nothing."""
