"""Finds the cluster of a name on a Ray, and ends one that no gateway leads to.

Used by ``cluster``, and by ``farshore down --ray-address``. Must not know how a cluster is started.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import ray
from ray._private import state

from farshore.controller.config import check_name, namespace
from farshore.controller.driver import ray_access
from farshore.controller.driver.ray_runtime import RayRuntime
from farshore.controller.launch.launcher import RaySlots, end_workers, kill_actor
from farshore.errors import NotFound

CONTROLLER = "controller"
"""The name of the controller's actor."""

DOWN_DEADLINE_S = 30.0
"""For a controller to end its cluster. What is left is killed then."""
STOP_DEADLINE_S = 5.0
"""For workers without a controller to end their streams."""
POLL_S = 0.1


def controller(name: str) -> Any | None:
    """The controller of the cluster ``name``; None if there is none."""
    try:
        return ray.get_actor(CONTROLLER, namespace(name))
    except ValueError:
        return None


def own_address() -> str:
    """The address of Ray's node that this process runs on. In a driver, ``ray.util.get_node_ip_address``
    gives the head's instead where Ray's address was given."""
    own = ray.get_runtime_context().get_node_id()
    return next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == own)


def has_ended(actor: Any) -> bool:
    """Whether Ray will not start the actor again."""
    return state.actors(actor._actor_id.hex()).get("State") == "DEAD"


def end_cluster(address: str, name: str, *, token_file: str | None, progress: Callable[[str], None]) -> None:
    """Ends the cluster ``name`` on the Ray at ``address``, also one whose controller is frozen or gone.
    ``token_file``: see :func:`~farshore.controller.driver.ray_access.token_file`.

    Raises NotFound if there is none, InvalidRequest for a wrong name, StartupError if Ray can't be joined.
    """
    check_name(name)
    runtime = RayRuntime(address, dashboard=False, token_file=ray_access.token_file(token_file))
    progress(f"joining Ray at {address}")
    runtime.start()
    try:
        if controller(name) is None and not RaySlots(namespace(name)).occupants():
            raise NotFound(f"no cluster {name} runs on the Ray at {address}: give its --name")
        progress(f"ending the cluster {name}")
        end(name)
    finally:
        runtime.stop()


def end(name: str) -> None:
    """Ends the cluster ``name`` on the Ray that this process uses. Blocks until nothing of it is left, or
    until what is left was killed. Raises nothing if there is none."""
    found = controller(name)
    if found is not None:
        found.begin_down.remote()
        end_s = time.monotonic() + DOWN_DEADLINE_S
        while controller(name) is not None and time.monotonic() < end_s:
            time.sleep(POLL_S)
    if (left := controller(name)) is not None:
        with contextlib.suppress(ray.exceptions.RayError):
            kill_actor(left)
    end_workers(RaySlots(namespace(name)), deadline_s=STOP_DEADLINE_S)
