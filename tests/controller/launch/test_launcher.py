"""The launcher's calls that must not wait for a node. Real workers are started by the tests of the driver."""

import threading

from farshore.controller.launch import launcher
from farshore.controller.launch.launcher import RaySlots
from farshore.controller.reconcile import Slot

WORKERS = 20


def test_kills_wait_for_no_node(monkeypatch):
    """Each of these nodes answers only when all have been asked."""
    asked, ended = threading.Barrier(WORKERS, timeout=60), threading.Semaphore(0)

    def kill_actor(handle):
        asked.wait()
        ended.release()

    monkeypatch.setattr(launcher, "kill_actor", kill_actor)
    monkeypatch.setattr(launcher.ray, "get_actor", lambda name, namespace: name)
    slots = RaySlots("farshore:test")
    for index in range(WORKERS):
        slots.kill(Slot("attention", index))
    for _ in range(WORKERS):
        assert ended.acquire(timeout=60)
