"""Types of the ids that several floors use. All are opaque: compare ids, never parse them."""

from typing import NewType

SequenceId = NewType("SequenceId", str)
"""One sequence. The gateway makes the id; the n completions of a request are (sequence, choice)."""

WorkerId = NewType("WorkerId", str)
"""One worker process. The controller makes the id; a restarted worker gets a new one."""

SpanId = NewType("SpanId", str)
"""One span in one store: ``<worker id>/<incarnation of the store>/<serial>``. Never reused."""

Epoch = NewType("Epoch", int)
"""The number of one ownership of a sequence, counted from 1 by the gateway that made the sequence's id.
Stores and gateways refuse writes of an older epoch."""

FIRST_EPOCH = Epoch(1)
