"""The controller: keeps the workers that the configuration asks for running.

Made by :class:`farshore.controller.actors.ControllerActor`. It is never on the token path: engines and
gateways go on without it, new requests too. All that it knows is observed, so a restarted one continues.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import ray
from grpc_health.v1 import health

from farshore import rpc
from farshore.cluster_token import ClusterToken
from farshore.controller.actors import AttentionActor, DenseActor, WorkerArguments
from farshore.controller.config import ClusterConfig, check_same
from farshore.controller.desired import Desired, StateFile
from farshore.controller.events import Events
from farshore.controller.launch import resources
from farshore.controller.launch.launcher import RayLauncher, end_workers
from farshore.controller.loop.loop import Loop
from farshore.controller.loop.probes import WorkerProbes
from farshore.controller.reconcile import KINDS, Kind, Slot
from farshore.controller.service import AdminService
from farshore.errors import FarshoreError, NotFound
from farshore.ids import WorkerId
from farshore.kvstore.directory.base import Directory
from farshore.kvstore.directory.connect import open_redis
from farshore.kvstore.directory.embedded import EmbeddedDirectory
from farshore.kvstore.directory.remote import DirectoryService
from farshore.models.config.model import ModelConfig
from farshore.proto import admin_pb2 as admin
from farshore.proto import admin_pb2_grpc as admin_grpc
from farshore.proto import cluster_pb2_grpc as pb_grpc
from farshore.text import quoted

MAX_CALLS = 64
WATCH_S = 1.0
"""For the driver and other watchers to see the event before everything ends."""

STOP_DEADLINE_S = 15.0
"""For the workers to end their streams; then they are killed."""

RETRY_S = 1.0
"""Time between two tries to reach Redis."""

T = TypeVar("T")

_LOG = logging.getLogger(__name__)


class Controller:
    """It observes and acts from construction until :meth:`down`. Thread-safe."""

    def __init__(
        self,
        config: ClusterConfig,
        model: ModelConfig,
        *,
        given: Collection[Kind],
        listen: str,
        state_folder: str,
        restarted: bool,
    ) -> None:
        """``given``: the kinds whose numbers an operator chose. ``listen``: HOST:PORT, the same after a
        restart, since workers and gateways know it. ``state_folder``: where the desired state is stored.
        ``restarted``: Ray started this controller again; it waits then until Redis answers, if the cluster
        has one. Raises PortInUse, ModelError, and InvalidRequest for a stored state that can't be read."""
        self._config = config
        self._worker_bytes = resources.worker_bytes(config, model)
        self._launcher = RayLauncher(config.namespace, self._new_worker)
        self._directory, self._desired, self.events = self._open(given, state_folder, restarted=restarted)
        token = ClusterToken.of_node(config.token_file)
        self._admin = AdminService(config, model, self._directory, self, token=token)
        self._going_down = threading.Event()
        self._checks = health.HealthServicer()
        self._server, self.address = rpc.serve(
            self._register,
            service=admin.DESCRIPTOR.services_by_name["AdminService"].full_name,
            listen=listen,
            threads=MAX_CALLS,
            token=token,
            checks=self._checks,
        )
        self.directory_url = config.redis.url if config.redis is not None else f"grpc://{self.address}"
        self._probes = WorkerProbes(self._directory, token=token)
        self._loop = Loop(
            desired=self._desired,
            directory=self._directory,
            launcher=self._launcher,
            probes=self._probes,
            events=self.events,
            grace_s=config.shard_grace_s,
            drain_timeout_s=config.drain_timeout_s,
        )
        if self._desired.ends:
            _answered(self.begin_down, patient=restarted)
        else:
            self._loop.start()

    def _open(
        self, given: Collection[Kind], state_folder: str, *, restarted: bool
    ) -> tuple[Directory, Desired, Events]:
        # A controller that is lost for good leaves its workers to the next one. They find its directory in
        # Redis, or at the same address.
        is_new = not restarted and not self._launcher.occupants()
        # Ray starts an actor again with the same id. A test's controller is no actor.
        own_id = ray.get_runtime_context().get_actor_id() or "no actor"
        common = {"given": given, "placement": self._config.placement, "restarted": restarted}
        common |= {"controller": own_id}
        if self._config.redis is None:
            file = StateFile(Path(state_folder) / "desired.json")
            desired = Desired(counts_of(self._config), load=file.load, store=file.store, **common)
            return EmbeddedDirectory(restarted=not is_new), desired, Events()
        redis = open_redis(self._config.redis.url)
        if is_new:
            redis.claim()

        def load() -> tuple[Desired, Events]:
            desired = Desired(
                counts_of(self._config), load=redis.load_state, store=redis.store_state, **common
            )
            return desired, Events(redis.events(), publish=redis.publish)

        return redis, *_answered(load, patient=restarted)

    def counts(self) -> dict[Kind, int]:
        """The number of workers of each kind that there are to be."""
        return self._desired.counts()

    def join(self, config: ClusterConfig, given: Collection[Kind]) -> None:
        """Takes the configuration of another driver, which starts no controller of its own. ``given``: the
        kinds whose numbers its operator chose. Raises InvalidRequest if it describes another cluster."""
        check_same(self._config, config)
        before, asked = self._desired.counts(), counts_of(config)
        counts = self._desired.configure({kind: asked[kind] for kind in given})
        if counts != before:
            self._tell_scaled(counts)

    def scale(self, changes: Mapping[Kind, int]) -> Mapping[Kind, int]:
        """See :class:`~farshore.controller.service.Operations`."""
        counts = self._desired.scale(changes)
        self._tell_scaled(counts)
        return counts

    def drain(self, worker: str, timeout_s: float | None) -> WorkerId:
        """See :class:`~farshore.controller.service.Operations`."""
        records = self._directory.listing().workers
        record = next((record for record in records if worker in (record.worker, record.slot)), None)
        if record is None:
            running = ", ".join(record.worker for record in records) or "no worker runs"
            raise NotFound(f"no worker {quoted(worker)} runs: choose one of {running}")
        self._desired.drain(record.worker, timeout_s)
        return record.worker

    def begin_down(self) -> None:
        """See :class:`~farshore.controller.service.Operations`."""
        if not self._going_down.is_set():
            self._desired.end()
            self._going_down.set()
            self.events.add("down", "cluster")
            threading.Thread(target=self._end, name="down", daemon=True).start()

    def problem(self, *, free: bool) -> str | None:
        """The missing resource and the fix, if workers do not fit; None if they do. ``free``: those that wait
        for a node, into what is free now; else all of them, into what the nodes have."""
        nodes = resources.all_nodes()
        declared = resources.are_declared(nodes)
        counts = self._desired.counts()
        needs = resources.needs(self._config, self._worker_bytes, nodes, counts)
        if free:
            nodes, taken = resources.free_nodes(), self._launcher.occupants().items()
            waiting = [slot.kind for slot, occupant in taken if not occupant.node]
            counts = {kind: waiting.count(kind) for kind in KINDS}
        for kind in KINDS:
            workers = {"workers": counts[kind], "each": needs[kind]}
            if problem := resources.missing(kind, nodes, **workers, declared=declared):
                return problem
            nodes = resources.beside(nodes, kind, **workers, declared=declared)
        return None

    def down(self) -> None:
        """Ends the loop, then all workers: their streams first, and what is left after STOP_DEADLINE_S by
        force. Idempotent."""
        self._checks.enter_graceful_shutdown()
        try:
            self._desired.end()
        except FarshoreError as error:
            _LOG.warning("the next cluster of this name starts as this one was scaled: %s", error)
        self._loop.stop()
        end_workers(self._launcher, deadline_s=STOP_DEADLINE_S)
        self._close()

    def pause(self) -> None:
        """Ends this controller after its round. The workers go on, and the next controller finds them."""
        self._checks.enter_graceful_shutdown()
        self._loop.stop()
        self._close()

    def _close(self) -> None:
        self._probes.stop()
        self._server.stop(0).wait()
        self._admin.close()
        self._directory.disconnect()

    def _tell_scaled(self, counts: Mapping[Kind, int]) -> None:
        self.events.add("scaled", " ".join(f"{kind}={count}" for kind, count in counts.items()))

    def _end(self) -> None:
        self._checks.enter_graceful_shutdown()
        time.sleep(WATCH_S)
        self.down()
        # Ray starts a controller that merely ends again.
        ray.kill(ray.get_runtime_context().current_actor)

    def _register(self, server: Any) -> None:
        admin_grpc.add_AdminServiceServicer_to_server(self._admin, server)
        if self._config.redis is None:
            pb_grpc.add_DirectoryServicer_to_server(DirectoryService(self._directory), server)

    def _new_worker(self, slot: Slot) -> tuple[type, dict[str, Any], dict[str, Any]]:
        """See :class:`RayLauncher`."""
        nodes, counts = resources.all_nodes(), self._desired.counts()
        each = resources.needs(self._config, self._worker_bytes, nodes, counts)[slot.kind]
        arguments = WorkerArguments(
            slot=str(slot),
            config=self._config,
            directory=self.directory_url,
            network=self._config.ray_address is not None,
            kind=slot.kind,
            workers=counts[slot.kind],
            need=each,
        )
        options = {"max_concurrency": 2}
        options |= resources.asked(slot.kind, nodes, each=each, workers=counts[slot.kind])
        if slot.kind == "dense":
            return DenseActor, options, {"arguments": arguments}
        options |= {"runtime_env": {"env_vars": rpc.SHARD_ENVIRONMENT}}
        return AttentionActor, options, {"arguments": arguments}


def _answered(action: Callable[[], T], *, patient: bool) -> T:
    """Returns what ``action`` does. ``patient``: tries again until it raises no FarshoreError, since Ray does
    not start a controller again whose construction fails."""
    while True:
        try:
            return action()
        except FarshoreError as error:
            if not patient:
                raise
            _LOG.warning("the controller waits: %s", error)
            time.sleep(RETRY_S)


def counts_of(config: ClusterConfig) -> dict[Kind, int]:
    """The numbers of workers of a configuration."""
    return {"dense": config.dense_workers, "attention": config.attention_workers}
