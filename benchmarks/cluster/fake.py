"""Workers without processes: a launcher whose workers announce themselves, for the controller's loop.

Called by ``benchmark``. Must not know what is measured.
"""

from collections.abc import Callable, Collection, Mapping
from itertools import count

from farshore.controller.launch.launcher import Occupant
from farshore.controller.reconcile import Slot
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import Directory, WorkerRecord


class FakeWorkers:
    """Implements the loop's ``Launcher`` and its ``Probes``."""

    def __init__(self) -> None:
        self._taken: dict[Slot, Occupant] = {}
        self._serials = count(1)

    def occupants(self) -> Mapping[Slot, Occupant]:
        return dict(self._taken)

    def start(self, slot: Slot) -> None:
        serial = next(self._serials)
        self._taken.setdefault(slot, Occupant(actor=f"a{serial}", node="10.0.0.1", process_id=serial))

    def stop(self, slot: Slot, *, grace_s: float) -> None:
        self._taken.pop(slot, None)

    def kill(self, slot: Slot) -> None:
        self._taken.pop(slot, None)

    def answering(self, slots: Collection[Slot]) -> Collection[Slot]:
        return set(slots) & self._taken.keys()

    def end_in_words(self, occupant: Occupant) -> str:
        return "ended"

    def silent_s(self, suspects: Mapping[WorkerId, str]) -> dict[WorkerId, float]:
        return dict.fromkeys(suspects, 0.0)

    def alive(self) -> set[WorkerId]:
        return set()

    def readers(self, engines: Mapping[WorkerId, str]) -> dict[WorkerId, int] | None:
        return {}

    def lose(self, doomed: Callable[[Slot], bool]) -> None:
        """Ends the workers in the slots for which ``doomed`` is true."""
        self._taken = {slot: occupant for slot, occupant in self._taken.items() if not doomed(slot)}

    def announce(self, directory: Directory) -> None:
        """Renews the leases of all workers."""
        for slot, occupant in self._taken.items():
            directory.renew(record_of(slot, occupant))


def record_of(slot: Slot, occupant: Occupant) -> WorkerRecord:
    """What the worker that occupies a slot announces."""
    return WorkerRecord(
        worker=WorkerId(f"{slot}-{occupant.process_id}"),
        kind=slot.kind,
        slot=str(slot),
        address=f"10.0.0.1:{occupant.process_id}",
        host="10.0.0.1",
        process_id=occupant.process_id,
        state="serving",
    )
