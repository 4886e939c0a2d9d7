"""Ends the workers of one node before the node itself ends: it starts no more, and its workers drain.

Called by ``farshore leave``, which a pod runs before Kubernetes ends it. The controller hears from the
workers that they drain, and starts others elsewhere. Must not know why the node ends.
"""

import contextlib
import time
from collections.abc import Callable

import ray
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2

from farshore.controller.config import namespace
from farshore.controller.driver import finding, ray_access
from farshore.controller.driver.ray_runtime import RayRuntime
from farshore.controller.launch.launcher import RaySlots
from farshore.errors import StartupError

POLL_S = 0.2
LATE_S = 2.0
"""For workers that did not drain in time to say so to their requests."""


def leave(
    address: str,
    *,
    host: str | None,
    token_file: str | None,
    timeout_s: float,
    progress: Callable[[str], None],
) -> None:
    """Makes Ray start nothing more on the node, and ends the workers there, of all clusters. Blocks until
    they have ended, or for ``timeout_s``, after which Ray ends the node. ``host``: the node's address; None:
    this host's. ``token_file``: see :func:`~farshore.controller.driver.ray_access.token_file`. Idempotent.

    Raises StartupError if Ray can't be joined, has no such node, or refuses; InvalidRequest without a token.
    """
    end_s = time.monotonic() + timeout_s
    runtime = RayRuntime(address, dashboard=False, token_file=ray_access.token_file(token_file))
    runtime.start()
    try:
        host = host or finding.own_address()
        nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] == host]
        if not nodes:
            raise StartupError(f"the Ray at {address} has no node {host}: give its --host")
        _close(nodes[0]["NodeID"], timeout_s)
        told: set[str] = set()
        while (left := _workers_on(host)) and time.monotonic() < end_s:
            for name in left.keys() - told:
                progress(f"draining {name}")
                left[name].leave.remote(max(0.0, end_s - time.monotonic() - LATE_S), heard=False)
            told |= left.keys()
            time.sleep(POLL_S)
    finally:
        runtime.stop()


def _close(node: str, timeout_s: float) -> None:
    """Makes Ray place nothing more on the node with this id, and end it after ``timeout_s``."""
    deadline_ms = int((time.time() + timeout_s) * 1000)
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = client.drain_node(node, reason, "farshore leave", deadline_ms)
    if not accepted:
        raise StartupError(f"Ray does not let the node go: {why}")


def _workers_on(host: str) -> dict[str, ray.actor.ActorHandle]:
    """Cluster and slot -> actor, of the workers on the node with this address."""
    prefix = namespace("")
    spaces = {entry["namespace"] for entry in ray.util.list_named_actors(all_namespaces=True)}
    found = {}
    for space in spaces:
        if space.startswith(prefix):
            for slot, occupant in RaySlots(space).occupants().items():
                if occupant.node == host:
                    with contextlib.suppress(ValueError):  # It ended meanwhile.
                        found[f"{space}/{slot}"] = ray.get_actor(str(slot), space)
    return found
