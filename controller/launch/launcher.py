"""Starts and ends workers as named, detached Ray actors: one actor name a slot.

Called by ``loop``, and by the driver to end a cluster whose controller is gone. Ray makes starting
idempotent: a name has at most one actor. It must not know how many workers there are to be.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray._private import state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from farshore.controller.launch.exits import actor_end_in_words
from farshore.controller.reconcile import KINDS, Slot

KILL_DEADLINE_S = 2.0
"""For a node to end a process. A node that does not answer is left to Ray's verdict."""

CALLS_S = 1.0
"""For Ray to free a killed actor's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupant:
    """The actor in a slot. Two actors are equal if they are the same incarnation."""

    actor: str
    node: str
    """The address of its node; empty while Ray has found none for it."""
    process_id: int


class Launcher(Protocol):
    """Starts and ends the workers of one cluster. Raises nothing: what fails shows in the next
    :meth:`occupants`."""

    def occupants(self) -> Mapping[Slot, Occupant]:
        """The slots that are taken, whether or not their workers answer."""

    def start(self, slot: Slot) -> None:
        """Starts a worker in a slot. Idempotent; returns before it runs. After a crash in the middle the
        worker either runs or does not."""

    def stop(self, slot: Slot, *, grace_s: float) -> None:
        """Ends a worker: it takes nothing new, lets what it has go on for ``grace_s`` at most, withdraws,
        ends its streams, then its process ends. Returns at once. Idempotent."""

    def kill(self, slot: Slot) -> None:
        """Ends a worker's process by SIGKILL, also one that is frozen. Returns at once. Idempotent."""

    def answering(self, slots: Collection[Slot]) -> Collection[Slot]:
        """Those of ``slots`` whose actors have answered a call since they were last among ``slots``. Never
        blocks: a later call tells of the answers to this one."""

    def end_in_words(self, occupant: Occupant) -> str:
        """How an occupant ended, such as "(process 7) was killed"; "ended" if that is unknown."""


class RaySlots:
    """The workers of one cluster, which starts none. ``namespace``: of the actors."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    def occupants(self) -> Mapping[Slot, Occupant]:
        named = ray.util.list_named_actors(all_namespaces=True)
        slots = {
            entry["name"]: slot
            for entry in named
            if entry["namespace"] == self._namespace and (slot := _slot_of(entry["name"])) is not None
        }
        details = state.actors()
        found: dict[Slot, Occupant] = {}
        for name, slot in slots.items():
            with contextlib.suppress(ValueError):  # It ended meanwhile.
                actor = ray.get_actor(name, self._namespace)._actor_id.hex()
                detail = details.get(actor, {})
                address = detail.get("Address", {})
                found[slot] = Occupant(
                    actor=actor, node=address.get("IPAddress", ""), process_id=detail.get("Pid", 0)
                )
        return found

    def stop(self, slot: Slot, *, grace_s: float) -> None:
        with contextlib.suppress(ValueError, ray.exceptions.RayError):
            handle = ray.get_actor(str(slot), self._namespace)
            if state.actors(handle._actor_id.hex()).get("State") == "ALIVE":
                handle.leave.remote(grace_s)
            else:
                # It may wait for room for ever, and the call with it.
                ray.kill(handle)

    def kill(self, slot: Slot) -> None:
        with contextlib.suppress(ValueError, ray.exceptions.RayError):
            handle = ray.get_actor(str(slot), self._namespace)
            # A node that is cut off lets the call wait, and other workers' nodes are not.
            threading.Thread(target=_kill, args=(handle,), name=f"kill {slot}", daemon=True).start()

    def end_in_words(self, occupant: Occupant) -> str:
        detail = state.actors(occupant.actor) or {}
        process_id = occupant.process_id or detail.get("Pid", 0)
        return actor_end_in_words(Exception(f"pid: {process_id} {detail.get('DeathCause', '')}"))


class RayLauncher(RaySlots):
    """See :class:`Launcher`. ``new_worker``: called with a slot, returns the actor class, the options beside
    the name, and the arguments."""

    def __init__(
        self, namespace: str, new_worker: Callable[[Slot], tuple[type, dict[str, Any], dict[str, Any]]]
    ) -> None:
        super().__init__(namespace)
        self._new_worker = new_worker
        self._pings: dict[Slot, Any] = {}

    def start(self, slot: Slot) -> None:
        actor_class, options, arguments = self._new_worker(slot)
        ray.remote(actor_class).options(
            name=str(slot),
            namespace=self._namespace,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=0,
            **options,
        ).remote(**arguments)

    def answering(self, slots: Collection[Slot]) -> Collection[Slot]:
        answered = set()
        pings = {slot: ping for slot, ping in self._pings.items() if slot in slots}
        for slot in slots:
            with contextlib.suppress(ValueError, ray.exceptions.RayError):
                if slot not in pings:
                    # Ray answers this call itself, in the actor's process, once it is constructed.
                    pings[slot] = ray.get_actor(str(slot), self._namespace).__ray_ready__.remote()
                elif ray.wait([pings[slot]], timeout=0)[0]:
                    ray.get(pings.pop(slot))
                    answered.add(slot)
        self._pings = pings
        return answered


def end_workers(workers: RaySlots, *, deadline_s: float) -> None:
    """Ends all workers: their streams first, and what is left after ``deadline_s`` by force."""
    end_s = time.monotonic() + deadline_s
    for slot in workers.occupants():
        workers.stop(slot, grace_s=0.0)
    while (left := workers.occupants()) and time.monotonic() < end_s:
        time.sleep(0.05)
    for slot in left:
        workers.kill(slot)
    end_s = time.monotonic() + KILL_DEADLINE_S + CALLS_S
    while workers.occupants() and time.monotonic() < end_s:
        time.sleep(0.05)


def kill_actor(handle: Any) -> None:
    """Ends an actor for good by SIGKILL, also one that is frozen: Ray itself only asks it to end. Raises
    Ray's errors."""
    detail = state.actors(handle._actor_id.hex())
    _kill_process(detail.get("Address", {}).get("NodeID", ""), detail.get("Pid", 0))
    ray.kill(handle)


def _kill(handle: Any) -> None:
    with contextlib.suppress(ray.exceptions.RayError):
        kill_actor(handle)


def _slot_of(name: str) -> Slot | None:
    kind, _, index = name.rpartition("-")
    if not index.isdecimal():
        return None
    return next((Slot(known, int(index)) for known in KINDS if known == kind), None)


def _kill_process(node: str, process_id: int) -> None:
    """Kills a process on a node."""
    if not (node and process_id):
        return
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    killing = ray.remote(_sigkill).options(num_cpus=0, scheduling_strategy=strategy).remote(process_id)
    ray.wait([killing], timeout=KILL_DEADLINE_S)


def _sigkill(process_id: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process_id, signal.SIGKILL)
