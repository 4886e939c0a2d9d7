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

from farshore import rpc
from farshore.cluster_token import ClusterToken
from farshore.controller import resources
from farshore.controller.actors import AttentionActor, DenseActor, WorkerArguments
from farshore.controller.config import ClusterConfig
from farshore.controller.desired import Desired
from farshore.controller.events import Events
from farshore.controller.launch import RayLauncher
from farshore.controller.loop import Loop
from farshore.controller.probes import WorkerProbes
from farshore.controller.reconcile import KINDS, Kind, Slot
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
        stored. ``restarted``: workers of an earlier controller may run. Raises PortInUse, ModelError."""
        self._config = config
        self._worker_bytes = resources.worker_bytes(config, model)
        self.events = Events()
        self._directory = EmbeddedDirectory(restarted=restarted)
        self._desired = Desired(
            {"dense": config.dense_workers, "attention": config.attention_workers},
            Path(state_folder) / "desired.json",
            placement=config.placement,
            keep=restarted,
        )
        token = ClusterToken.of_node(config.token_file)
        self._admin = AdminService(config, model, self._directory, self, token=token)
        self._going_down = threading.Event()
        self._server, self.address = rpc.serve(
            self._register,
            service=pb.DESCRIPTOR.services_by_name["Directory"].full_name,
            listen=listen,
            threads=MAX_CALLS,
            token=token,
        )
        self._launcher = RayLauncher(namespace, self._new_worker)
        self._probes = WorkerProbes(self._directory, token=token)
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
        """The missing resource and the fix, if workers do not fit; None if they do. ``free``: those that wait
        for a node, into what is free now; else all of them, into what the nodes have."""
        nodes = resources.all_nodes()
        declared = resources.are_declared(nodes)
        counts = self._desired.counts()
        if free:
            nodes, taken = resources.free_nodes(), self._launcher.occupants().items()
            waiting = [slot.kind for slot, occupant in taken if not occupant.node]
            counts = {kind: waiting.count(kind) for kind in KINDS}
        for kind in KINDS:
            each = {"workers": counts[kind], "each_bytes": self._worker_bytes[kind]}
            if problem := resources.missing(kind, nodes, **each, declared=declared):
                return problem
            nodes = resources.beside(nodes, kind, **each, declared=declared)
        return None

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
        workers, each_bytes = self._desired.counts()[slot.kind], self._worker_bytes[slot.kind]
        arguments = WorkerArguments(
            slot=str(slot),
            config=self._config,
            directory=f"grpc://{self.address}",
            network=self._config.ray_address is not None,
            kind=slot.kind,
            workers=workers,
            worker_bytes=each_bytes,
        )
        options = {"max_concurrency": 2}
        options |= resources.asked(slot.kind, resources.all_nodes(), each_bytes=each_bytes, workers=workers)
        if slot.kind == "dense":
            return DenseActor, options, {"arguments": arguments}
        options |= {"runtime_env": {"env_vars": rpc.SHARD_ENVIRONMENT}}
        return AttentionActor, options, {"arguments": arguments}
