"""The controller's actor as a driver uses it: starts it, and calls it under a deadline.

Used by ``cluster``. Must not know in which order a cluster starts.
"""

import time
from collections.abc import Callable, Collection
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from farshore.controller import listen
from farshore.controller.actors import ControllerActor
from farshore.controller.config import ClusterConfig
from farshore.controller.driver import finding
from farshore.controller.events import ClusterEvent
from farshore.controller.launch.exits import actor_end_in_words
from farshore.controller.reconcile import Kind
from farshore.errors import FarshoreError, StartupError
from farshore.models.config.model import ModelConfig

POLL_S = 0.5
"""How often a waiting call checks that the driver can go on."""

START_DEADLINE_S = 120.0
"""For the controller's process to answer its first call, and each later one."""

CALLS = 8
"""Calls of the driver that the controller takes at once."""


def start_controller(
    config: ClusterConfig,
    model: ModelConfig,
    *,
    given: Collection[Kind],
    creator: str,
    host: str,
    state_folder: str,
) -> Any:
    """Starts a controller on this node, where its port, chosen here, and its state stay the same. Returns its
    actor. If the node is lost, the workers go on; the next driver starts another one, which needs a directory
    in Redis to find them. ``host``: the address to listen on. See :class:`ControllerActor` for the others."""
    return (
        ray.remote(ControllerActor)
        .options(
            name=finding.CONTROLLER,
            namespace=config.namespace,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            num_cpus=0,
            max_concurrency=CALLS,
            scheduling_strategy=NodeAffinitySchedulingStrategy(
                ray.get_runtime_context().get_node_id(), soft=False
            ),
        )
        .remote(
            config,
            model,
            given=given,
            creator=creator,
            listen=f"{listen.bracketed(host)}:{config.controller_port or listen.free_port(host)}",
            state_folder=state_folder,
        )
    )


class RemoteController:
    """Calls a controller's ``actor``. Every method blocks, and raises the FarshoreError that the controller
    raised; Ray's errors and a missed deadline become StartupError. Meanwhile ``check`` is called every
    POLL_S, and raises if the driver can't go on."""

    def __init__(self, actor: Any, *, check: Callable[[], None]) -> None:
        self.actor = actor
        self._check = check

    def address(self) -> str:
        return self._call("address")

    def directory(self) -> str:
        return self._call("directory")

    def creator(self) -> str:
        return self._call("creator")

    def join(self, config: ClusterConfig, given: Collection[Kind]) -> None:
        self._call("join", config, given)

    def counts(self) -> dict[Kind, int]:
        return self._call("counts")

    def problem(self, *, free: bool) -> str | None:
        return self._call("problem", free=free)

    def events(self) -> list[ClusterEvent]:
        """All that it has."""
        return self._call("events", 0)

    def _call(self, method: str, *arguments: Any, **named: Any) -> Any:
        call = getattr(self.actor, method).remote(*arguments, **named)
        until_s = time.monotonic() + START_DEADLINE_S
        while not ray.wait([call], timeout=POLL_S)[0]:
            self._check()
            if time.monotonic() > until_s:
                raise StartupError(
                    f"the controller did not answer within {START_DEADLINE_S:.0f} s: see Ray's logs"
                )
        try:
            return ray.get(call)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FarshoreError):
                raise error.cause from None
            raise StartupError(f"the controller failed: {error.cause or error}") from error
        except ray.exceptions.RayActorError as error:
            raise StartupError(f"the controller {actor_end_in_words(error)}") from error
        except ray.exceptions.RayError as error:
            raise StartupError(f"the controller did not answer: {error}") from error
