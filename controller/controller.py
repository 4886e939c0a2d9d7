"""The controller: keeps the workers that the configuration asks for running.

Made by :class:`farshore.controller.actors.ControllerActor`. It is never on the token path: engines and
gateways go on without it, new requests too. All that it knows is observed, so a restarted one continues.
"""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node

from farshore import rpc
from farshore.controller.actors import AttentionActor, DenseActor, WorkerArguments
from farshore.controller.config import ClusterConfig
from farshore.controller.desired import Desired
from farshore.controller.events import Events
from farshore.controller.launch import RayLauncher
from farshore.controller.loop import Loop
from farshore.controller.probes import WorkerProbes
from farshore.controller.reconcile import Kind, Slot
from farshore.controller.service import AdminService
from farshore.kvstore.directory.embedded import EmbeddedDirectory
from farshore.kvstore.directory.remote import DirectoryService
from farshore.models.config.model import ModelConfig
from farshore.proto import admin_pb2_grpc as admin_grpc
from farshore.proto import cluster_pb2 as pb
from farshore.proto import cluster_pb2_grpc as pb_grpc

MAX_CALLS = 64
WATCH_S = 1.0
"""For the driver and other watchers to see the event before everything ends."""

STOP_DEADLINE_S = 15.0
"""For the workers to end their streams; then they are killed."""


class Controller:
    """It observes and acts from construction until :meth:`down`. Thread-safe."""

    def __init__(
        self,
        config: ClusterConfig,
        model: ModelConfig,
        *,
        namespace: str,
        listen: str,
        state_folder: str,
        restarted: bool,
    ) -> None:
        """``namespace``: of the workers' actors. ``listen``: HOST:PORT, the same after a restart, since
        workers and gateways know it. ``state_folder``: where the last scale is
        stored. ``restarted``: workers of an earlier controller may run. Raises PortInUse."""
        self._config = config
        self.events = Events()
        self._directory = EmbeddedDirectory(restarted=restarted)
        self._desired = Desired(
            {"dense": config.dense_workers, "attention": config.attention_workers},
            Path(state_folder) / "desired.json",
            placement=config.placement,
            keep=restarted,
        )
        self._admin = AdminService(config, model, self._directory, self)
        self._going_down = threading.Event()
        self._server, self.address = rpc.serve(
            self._register,
            service=pb.DESCRIPTOR.services_by_name["Directory"].full_name,
            listen=listen,
            threads=MAX_CALLS,
        )
        self._launcher = RayLauncher(namespace, self._new_worker)
        self._probes = WorkerProbes(self._directory)
        self._loop = Loop(
            desired=self._desired.counts,
            directory=self._directory,
            launcher=self._launcher,
            probes=self._probes,
            events=self.events,
            grace_s=config.shard_grace_s,
        )
        self._loop.start()

    def scale(self, changes: Mapping[Kind, int]) -> Mapping[Kind, int]:
        """See :class:`~farshore.controller.service.Operations`."""
        counts = self._desired.scale(changes)
        self.events.add("scaled", " ".join(f"{kind}={count}" for kind, count in counts.items()))
        return counts

    def begin_down(self) -> None:
        """See :class:`~farshore.controller.service.Operations`."""
        if not self._going_down.is_set():
            self._going_down.set()
            self.events.add("down", "cluster")
            threading.Thread(target=self._end, name="down", daemon=True).start()

    def problem(self, *, free: bool) -> str | None:
        """The missing memory and the fix, if attention workers do not fit; None if they do. ``free``: those
        that wait for a node, into what is free now; else all of them, into what the nodes have."""
        if free:
            nodes, slots = _free_memory(), self._launcher.occupants().items()
            workers = sum(slot.kind == "attention" and not occupant.node for slot, occupant in slots)
        else:
            nodes, workers = _total_memory(), self._desired.counts()["attention"]
        return too_little_memory(nodes, workers=workers, each_bytes=self._config.kv_memory_bytes)

    def down(self) -> None:
        """Ends the loop, then all workers: their streams first, and what is left after STOP_DEADLINE_S by
        force. Idempotent."""
        self._loop.stop()
        end_s = time.monotonic() + STOP_DEADLINE_S
        for slot in self._launcher.occupants():
            self._launcher.stop(slot)
        while (left := self._launcher.occupants()) and time.monotonic() < end_s:
            time.sleep(0.05)
        for slot in left:
            self._launcher.kill(slot)
        self._probes.stop()
        self._server.stop(0).wait()
        self._admin.close()

    def _end(self) -> None:
        time.sleep(WATCH_S)
        self.down()
        # Ray starts a controller that merely ends again.
        ray.kill(ray.get_runtime_context().current_actor)

    def _register(self, server: Any) -> None:
        admin_grpc.add_AdminServicer_to_server(self._admin, server)
        pb_grpc.add_DirectoryServicer_to_server(DirectoryService(self._directory), server)

    def _new_worker(self, slot: Slot) -> tuple[type, dict[str, Any], dict[str, Any]]:
        """See :class:`RayLauncher`."""
        config = self._config
        nodes = max(1, len(_nodes()))
        arguments = WorkerArguments(
            slot=str(slot),
            config=config,
            directory=f"grpc://{self.address}",
            network=config.ray_address is not None,
            workers_per_node=max(1, -(-self._desired.counts()[slot.kind] // nodes)),
        )
        options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 2, "scheduling_strategy": "SPREAD"}
        if slot.kind == "dense":
            return DenseActor, options, {"arguments": arguments}
        options |= {
            "memory": config.kv_memory_bytes,
            "runtime_env": {"env_vars": rpc.SHARD_ENVIRONMENT},
        }
        return AttentionActor, options, {"arguments": arguments}


def _total_memory() -> dict[str, int]:
    """Address of each node -> bytes of memory that Ray gives to actors there in all."""
    return {node["NodeManagerAddress"]: int(node["Resources"].get("memory", 0)) for node in _nodes()}


def _free_memory() -> dict[str, int]:
    """Address of each node -> bytes of memory that Ray has not given to actors yet."""
    free = available_resources_per_node()
    return {
        node["NodeManagerAddress"]: int(free.get(node["NodeID"], {}).get("memory", 0)) for node in _nodes()
    }


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def too_little_memory(nodes: Mapping[str, int], *, workers: int, each_bytes: int) -> str | None:
    """A message with the missing memory and the fix, or None if the workers fit. ``nodes``: address ->
    bytes."""
    if sum(memory // each_bytes for memory in nodes.values()) >= workers:
        return None
    have = (
        ", ".join(f"{_mib(memory)} on {node}" for node, memory in sorted(nodes.items())) or "no node at all"
    )
    each = " each" if workers > 1 else ""
    return (
        f"{workers} attention worker{'s' if workers > 1 else ''} with {_mib(each_bytes)} of memory{each} "
        f"({_mib(workers * each_bytes)} in all) do not fit: Ray has {have}; lower --kv-memory or "
        "--attention-workers, or add nodes"
    )


def _mib(count_bytes: int) -> str:
    return f"{count_bytes / (1 << 20):,.0f} MiB"
