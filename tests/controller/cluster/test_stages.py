"""Every process of a cluster is killed and frozen at every stage of its start, of a scale and of a drain.

What follows is the desired cluster, or an end with one line that says why; no slot has two workers, and no
process is left. The complete form is the soak: `pytest -m soak tests/controller/cluster/test_stages.py`.
"""

import contextlib
import itertools
import os
import signal
import threading

import pytest

from farshore.client.sdk import Client

from ..running import ANSWER, DEADLINE_S, answer, processes, until

PAUSE_S = 3.0
OPTIONS = ("--kv-memory", "64MiB", "--attention-workers", "2", "--shard-grace", "2", "--drain-timeout", "5")

PROCESSES = {
    "controller": "^ray::ControllerActor",
    "attention": "^ray::AttentionActor",
    "dense": "^ray::DenseActor",
    "gateway": "farshore.gateway",
    "raylet": "/raylet/raylet",
    "gcs": "/gcs/gcs_server",
    "driver": "",
}
UNREPLACED = ("gateway", "raylet", "gcs")
"""Their end ends the command, with an error."""
STARTING = (
    "starting Ray",
    "starting the controller",
    "starting .* attention",
    "connecting|loading",
    "gateway",
)
FAULTS = (signal.SIGKILL, signal.SIGSTOP)
CHANGES = {"more": 3, "fewer": 1, "drain": 2}
"""Change of a running cluster -> the attention workers that it leads to."""

START_CASES = list(itertools.product(STARTING, PROCESSES, FAULTS))
QUICK_STARTS = [
    ("starting .* attention", "controller", signal.SIGKILL),
    ("connecting|loading", "attention", signal.SIGSTOP),
]
CHANGE_CASES = list(itertools.product(CHANGES, PROCESSES, FAULTS))
QUICK_CHANGES = [("drain", "controller", signal.SIGKILL)]


def _marked(cases, quick):
    """All cases, each marked: the quick ones for CI, the others for the soak."""
    return [
        pytest.param(*case, marks=pytest.mark.heavy if case in quick else pytest.mark.soak) for case in cases
    ]


def _found(server, name):
    """Process ids of the server's processes of this name."""
    if name == "driver":
        return [server.process.pid]
    return processes(server, PROCESSES[name])


def _strike(server, name, number):
    """Sends the signal to one process of this name, when there is one. Returns its id; None if the command
    has ended. A frozen driver goes on later: nothing but the driver could end it."""
    victims = until(
        lambda: server.process.poll() is not None or _found(server, name), f"no process {name} appeared"
    )
    if victims is True:
        return None
    with contextlib.suppress(ProcessLookupError):
        os.kill(victims[0], number)
    if name == "driver" and number == signal.SIGSTOP:
        threading.Event().wait(PAUSE_S)
        os.kill(victims[0], signal.SIGCONT)
    return victims[0]


def _check_desired(client, attention, *, drained=None, struck=None):
    """Asserts that the cluster becomes the desired one, answers, and has no slot with two workers.
    ``drained``: a worker that is to end. ``struck``: the id of a process that is dead or frozen: its worker
    is listed while its lease holds."""
    kinds = ["attention"] * attention + ["dense"]

    def desired():
        workers = client.status().workers
        ended = any(worker.worker_id == drained or worker.process_id == struck for worker in workers)
        ready = [worker for worker in workers if worker.state == "ready"]
        return sorted(worker.kind for worker in ready) == kinds and not ended and ready

    workers = until(desired, f"not {attention} attention workers, or {drained} or process {struck} goes on")
    until(lambda: answer(client) == ANSWER, "no answer")
    slots = [worker.worker_id.rpartition("-")[0] for worker in workers]
    assert len(set(slots)) == len(slots) == attention + 1


def _end(server):
    """Waits for what follows a fault during the start. Returns the gateway's address; None if the command
    ended, for which it gave one reason."""
    until(
        lambda: server.process.poll() is not None or server.out.find(r"serves \S+ at (\S+)"),
        "it neither serves nor ends",
    )
    if (serving := server.out.find(r"serves \S+ at (\S+)")) is not None:
        return serving[1]
    return None


@pytest.mark.parametrize(("stage", "name", "number"), _marked(START_CASES, QUICK_STARTS))
def test_a_fault_at_a_stage_of_the_start(marked, stage, name, number):
    server = marked.start("serve", "--port", "0", *OPTIONS)
    try:
        server.err.await_match(stage)
        struck = _strike(server, name, number)
        _check_end(server, name, number, struck)
    finally:
        # A fault that is not survived shows above; the rest of the processes must end then, too.
        server.process.kill()
        server.process.wait()


def _check_end(server, name, number, struck):
    """Checks what follows a fault during the start. ``struck``: see :func:`_check_desired`."""
    address = _end(server)
    if address is None:
        _check_ended(server, name)
        return
    with Client(address) as client:
        _check_running(server, client, name, number, attention=2, struck=struck)


def _check_running(server, client, name, number, *, attention, **ended):
    """Checks what follows a fault in a cluster that serves, and ends the cluster. ``attention``: the workers
    that it is to have. ``ended``: see :func:`_check_desired`."""
    if number == signal.SIGKILL and name in (*UNREPLACED, "driver"):
        server.process.wait(DEADLINE_S)
        _check_ended(server, name)
    elif name in UNREPLACED:
        # What a frozen one does is not missed until it is asked. The fixture finds what the end leaves.
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(DEADLINE_S)
    else:
        _check_desired(client, attention, **ended)
        assert server.end(signal.SIGTERM) == 0


def _check_ended(server, name):
    """Checks that the command ended by the fault, and gave one reason if it could."""
    if name == "driver":
        assert server.process.returncode == -signal.SIGKILL
    else:
        assert server.process.returncode == 1
        server.err.await_match("farshore: error: ")


@pytest.mark.parametrize(("change", "name", "number"), _marked(CHANGE_CASES, QUICK_CHANGES))
def test_a_fault_in_the_middle_of_a_change(serve, change, name, number):
    server, address = serve(*OPTIONS)
    with Client(address) as client:
        _check_desired(client, 2)
        drained = client.drain("attention-1") if change == "drain" else None
        if drained is None:
            client.scale(attention=CHANGES[change])
        struck = _strike(server, name, number)
        ended = {"drained": drained, "struck": struck}
        _check_running(server, client, name, number, attention=CHANGES[change], **ended)
