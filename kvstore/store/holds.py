"""Which sequence holds which span, in which epoch, and which epochs are over.

Called by ``store`` before every change to a span; a remote store keeps the same table for its own connection.
Every hold belongs to a sequence, so that a new owner of the sequence can give back the holds of a dead one,
including those of forks and prefix hits. The table is by sequence, so that no call looks at the holds of
other sequences. It must not know memory.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable
from weakref import WeakKeyDictionary

from farshore.errors import Fenced
from farshore.ids import Epoch, SequenceId, SpanId
from farshore.kvstore.base import Removals


class HoldTable:
    """A sequence holds a span or does not: a second hold on the same span changes nothing. Not thread-safe.

    ``fences``: the number of fences that are remembered of sequences without holds.
    """

    def __init__(self, *, fences: int) -> None:
        self._fence_limit = fences
        self._fences: OrderedDict[SequenceId, Epoch] = OrderedDict()
        self._newest: dict[SequenceId, Epoch] = {}  # newest epoch of each sequence in _held
        self._held: dict[SequenceId, dict[SpanId, Epoch]] = {}
        self._holders: dict[SpanId, set[SequenceId]] = {}
        self._watches: WeakKeyDictionary[Removals, frozenset[SequenceId]] = WeakKeyDictionary()

    def watch(self, removals: Removals, sequences: Collection[SequenceId]) -> None:
        """See :meth:`farshore.kvstore.base.ShardStore.watch`."""
        self._watches[removals] = frozenset(sequences)

    def admit(self, sequence: SequenceId, epoch: Epoch) -> None:
        """Raises Fenced if a newer epoch of the sequence has been seen. Otherwise older epochs are over from
        now on, for as long as the sequence holds a span."""
        newest = max(self._newest.get(sequence, epoch), self._fences.get(sequence, epoch))
        if epoch < newest:
            raise Fenced(f"epoch {epoch} of {sequence} is over: {newest} owns it")
        if sequence in self._newest:
            self._newest[sequence] = epoch

    def fence(self, sequence: SequenceId, epoch: Epoch) -> None:
        """Ends all epochs of the sequence below ``epoch``. Never lowers an earlier fence."""
        self._fences[sequence] = max(epoch, self._fences.get(sequence, epoch))
        self._fences.move_to_end(sequence)
        if sequence in self._newest:
            self._newest[sequence] = max(epoch, self._newest[sequence])
        while len(self._fences) > self._fence_limit:
            self._fences.popitem(last=False)

    def add(self, sequence: SequenceId, span: SpanId, epoch: Epoch) -> None:
        """The sequence holds the span, in ``epoch`` or in the newer one of an earlier hold."""
        held = self._held.setdefault(sequence, {})
        held[span] = max(epoch, held.get(span, epoch))
        self._newest[sequence] = max(epoch, self._newest.get(sequence, epoch))
        self._holders.setdefault(span, set()).add(sequence)

    def remove(self, sequence: SequenceId, spans: Iterable[SpanId], epoch: Epoch) -> list[SpanId]:
        """Gives back the sequence's holds on ``spans`` that are of ``epoch`` or older. Returns the spans
        whose last hold that was."""
        held = self._held.get(sequence, {})
        for removals, watched in self._watches.items():
            if held and sequence in watched:
                removals.count += 1
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
        """The spans that the sequence holds."""
        return list(self._held.get(sequence, ()))

    def all(self) -> list[tuple[SequenceId, SpanId, Epoch]]:
        """Every hold with its epoch."""
        return [
            (sequence, span, epoch) for sequence, held in self._held.items() for span, epoch in held.items()
        ]

    def sequences(self) -> frozenset[SequenceId]:
        """The sequences that hold a span."""
        return frozenset(self._held)

    def holders(self, span: SpanId) -> int:
        """How many sequences hold the span."""
        return len(self._holders.get(span, ()))

    def has(self, sequence: SequenceId, span: SpanId) -> bool:
        """Whether the sequence holds the span."""
        return span in self._held.get(sequence, ())

    def check_integrity(self, spans: Collection[SpanId]) -> None:
        """AssertionError unless all tables agree and name only ``spans``."""
        pairs = {(sequence, span) for sequence, held in self._held.items() for span in held}
        assert pairs == {
            (sequence, span) for span, holders in self._holders.items() for sequence in holders
        }, "the tables by sequence and by span differ"
        assert all(self._held.values()) and all(self._holders.values()), "an empty entry was left"
        assert self._newest.keys() == self._held.keys(), "epochs of sequences that hold nothing"
        assert self._holders.keys() <= set(spans), "a hold on a span that is not there"
