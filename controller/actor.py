"""The controller as Ray knows it: a name for it that costs the driver nothing.

Ray wants the class where an actor is made, and the controller's own brings PyTorch, which takes the driver
two seconds before anything has started. Called by ``cluster``.
"""

from typing import Any

from farshore.controller.config import ClusterConfig
from farshore.controller.parts import Ended
from farshore.models.config import ModelConfig


class ControllerActor:
    """As :class:`farshore.controller.controller.Controller`, in the actor's process."""

    def __init__(self, config: ClusterConfig, model: ModelConfig) -> None:
        from farshore.controller.controller import Controller

        self._controller = Controller(config, model)

    def address(self) -> str:
        return self._controller.address()

    def place(self) -> dict[Any, str]:
        return self._controller.place()

    def load(self) -> dict[Any, str]:
        return self._controller.load()

    def loading(self) -> tuple[int, int]:
        return self._controller.loading()

    def ended(self) -> list[Ended]:
        return self._controller.ended()

    def stop(self) -> None:
        self._controller.stop()
