"""Waits until the workers of a cluster that starts can serve, or says why they can't.

Called by ``cluster``. Must not know how workers are started.
"""

import time
from collections.abc import Callable
from dataclasses import replace

from farshore.controller.config import LOAD_DEADLINE_S, PLACE_DEADLINE_S, ClusterConfig
from farshore.controller.driver import start_words
from farshore.controller.driver.remote_controller import RemoteController
from farshore.controller.launch.exits import NOT_STARTED
from farshore.errors import ModelError, StartupError, TransportError, Unauthenticated
from farshore.kvstore.directory.base import Directory, WorkerRecord

FAILURES_S = 2.0
"""How often the controller is asked whether workers failed to start."""

START_POLL_S = 0.1
"""How often the directory is asked for the workers."""


def await_workers(
    config: ClusterConfig,
    controller: RemoteController,
    directory: Directory,
    *,
    is_found: bool,
    check: Callable[[], None],
    pause: Callable[[float], object],
    progress: Callable[[str], None],
) -> tuple[WorkerRecord, ...]:
    """Blocks until every dense worker serves and all attention workers have joined each of them; in a cluster
    that was found, one of each kind. Returns the listed workers. ``check`` is called again and again, and
    raises if the driver can't go on; ``pause`` waits for some seconds; ``progress`` is called with a few
    words at each stage. Raises ModelError if a worker can't load the model, StartupError if workers find no
    room or a deadline passes."""
    counts = controller.counts()
    if is_found:
        counts = {kind: min(count, 1) for kind, count in counts.items()}
    config = replace(config, dense_workers=counts["dense"], attention_workers=counts["attention"])
    began_s, began_unix_s, look_s = time.monotonic(), time.time(), 0.0
    told, lacking = "", None
    # A private Ray has one node; nodes of a joined Ray may still come.
    if config.ray_address is None and (problem := controller.problem(free=False)):
        raise StartupError(problem)
    while True:
        check()
        waited_s = time.monotonic() - began_s
        records = _listed(directory)
        attention = sum(record.kind == "attention" for record in records)
        dense = [record for record in records if record.kind == "dense"]
        placed = attention >= config.attention_workers
        needed = config.attention_workers if config.placement == "offload" else 0
        ready = sum(record.state == "serving" and record.shards >= needed for record in dense)
        if placed and ready >= config.dense_workers:
            return records
        if not (dense and placed) and waited_s >= look_s:
            look_s = waited_s + FAILURES_S
            _check_starts(controller, since_s=began_unix_s)
            lacking = controller.problem(free=True) if waited_s > 5 * FAILURES_S else None
        for record in dense:
            if record.state == "failed":
                raise ModelError(record.failure)
        if not (dense and placed) and waited_s > PLACE_DEADLINE_S:
            problem = controller.problem(free=True) or "see the logs of Ray on its nodes"
            raise StartupError(f"workers are not started after {waited_s:.0f} s: {problem}")
        if waited_s > LOAD_DEADLINE_S:
            raise StartupError(f"not serving after {waited_s:.0f} s: see Ray's logs")
        told = start_words.tell(progress, told, config, dense, lacking, placed=placed)
        pause(START_POLL_S)


def _check_starts(controller: RemoteController, *, since_s: float) -> None:
    """Raises StartupError if a worker could not start, because of its options or its node's token."""
    for event in controller.events():
        if event.kind == "lost" and event.unix_s >= since_s and NOT_STARTED in event.detail:
            raise StartupError(f"{event.subject} {event.detail}")


def _listed(directory: Directory) -> tuple[WorkerRecord, ...]:
    try:
        return directory.listing().workers
    except Unauthenticated as error:
        raise StartupError(str(error)) from error
    except TransportError:
        return ()  # The controller restarts.
