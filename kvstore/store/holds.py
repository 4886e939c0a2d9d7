"""Who holds which span, in which epoch, and which epochs are over.

The store asks before every change to a span; a remote store keeps the same books for its own connection.
Every hold belongs to a sequence, so that a new owner can give back what a dead one had, forks and prefix hits
included. Kept by sequence, so that no call looks at what other sequences have. It must not know memory.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable

from farshore.errors import Fenced
from farshore.ids import Epoch, SequenceId, SpanId


class Holds:
    """A sequence holds a span or it does not: holding twice is holding once. Not thread-safe.

    ``fences``: of how many sequences that hold nothing the last fence is remembered at most.
    """

    def __init__(self, *, fences: int) -> None:
        self._fence_limit = fences
        self._fences: OrderedDict[SequenceId, Epoch] = OrderedDict()
        self._newest: dict[SequenceId, Epoch] = {}  # of the sequences in _held
        self._held: dict[SequenceId, dict[SpanId, Epoch]] = {}
        self._holders: dict[SpanId, set[SequenceId]] = {}

    def admit(self, sequence: SequenceId, epoch: Epoch) -> None:
        """Raises Fenced if a newer epoch of the sequence has been seen; else older ones are over from now on,
        for as long as the sequence holds anything."""
        newest = max(self._newest.get(sequence, epoch), self._fences.get(sequence, epoch))
        if epoch < newest:
            raise Fenced(f"epoch {epoch} of {sequence} is over: {newest} owns it")
        if sequence in self._newest:
            self._newest[sequence] = epoch

    def fence(self, sequence: SequenceId, epoch: Epoch) -> None:
        self._fences[sequence] = max(epoch, self._fences.get(sequence, epoch))
        self._fences.move_to_end(sequence)
        if sequence in self._newest:
            self._newest[sequence] = max(epoch, self._newest[sequence])
        while len(self._fences) > self._fence_limit:
            self._fences.popitem(last=False)

    def add(self, sequence: SequenceId, span: SpanId, epoch: Epoch) -> None:
        """The sequence holds the span, in this epoch or the newer one it already held it in."""
        held = self._held.setdefault(sequence, {})
        held[span] = max(epoch, held.get(span, epoch))
        self._newest[sequence] = max(epoch, self._newest.get(sequence, epoch))
        self._holders.setdefault(span, set()).add(sequence)

    def remove(self, sequence: SequenceId, spans: Iterable[SpanId], epoch: Epoch) -> list[SpanId]:
        """Gives back what the sequence holds of ``spans`` in that epoch or an older one; returns which of
        them nobody holds any more."""
        held = self._held.get(sequence, {})
        unheld = []
        for span in spans:
            if span not in held or held[span] > epoch:
                continue
            del held[span]
            self._holders[span].remove(sequence)
            if not self._holders[span]:
                del self._holders[span]
                unheld.append(span)
        if sequence in self._held and not held:
            del self._held[sequence], self._newest[sequence]
        return unheld

    def of(self, sequence: SequenceId) -> list[SpanId]:
        return list(self._held.get(sequence, ()))

    def all(self) -> list[tuple[SequenceId, SpanId, Epoch]]:
        """Every hold, and its epoch."""
        return [(s, span, epoch) for s, held in self._held.items() for span, epoch in held.items()]

    def sequences(self) -> frozenset[SequenceId]:
        """Those that hold anything."""
        return frozenset(self._held)

    def holders(self, span: SpanId) -> int:
        return len(self._holders.get(span, ()))

    def holds(self, sequence: SequenceId, span: SpanId) -> bool:
        return span in self._held.get(sequence, ())

    def check_integrity(self, spans: Collection[SpanId]) -> None:
        """AssertionError unless both views agree and name none but ``spans``."""
        pairs = {(sequence, span) for sequence, held in self._held.items() for span in held}
        assert pairs == {(s, span) for span, holders in self._holders.items() for s in holders}, "two views"
        assert all(self._held.values()) and all(self._holders.values()), "an empty entry was left"
        assert self._newest.keys() == self._held.keys(), "epochs of sequences that hold nothing"
        assert self._holders.keys() <= set(spans), "a hold on a span that is not there"
