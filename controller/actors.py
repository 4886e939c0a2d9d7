"""The Ray actors: the controller and the workers as Ray sees them.

Used by ``launch`` and ``cluster``. Ray needs an actor's class in the process that starts it. These classes
wrap the real ones, so that only the actor's own process imports these: PyTorch alone takes two seconds. An
actor's ``__repr__`` is what the Ray dashboard shows.
"""

import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray._private.utils import get_num_cpus

from farshore.cluster_token import ClusterToken
from farshore.controller.config import ClusterConfig
from farshore.controller.gauges import Gauges, Sample
from farshore.controller.launch import resources
from farshore.controller.listen import bracketed
from farshore.controller.reconcile import Kind
from farshore.ids import WorkerId
from farshore.kvstore.directory.connect import check_token, open_directory
from farshore.models.config.model import ModelConfig
from farshore.workers.ending import Ending
from farshore.workers.ending import Worker as EndingWorker

if TYPE_CHECKING:
    from farshore.workers.device import Device

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerArguments:
    """The arguments of every worker. Small: Ray keeps them in its GCS."""

    slot: str
    config: ClusterConfig
    directory: str
    """URL of the directory: see :func:`~farshore.kvstore.directory.connect.open_directory`."""
    network: bool
    """Whether to listen on the address of the worker's node; else on loopback."""
    kind: Kind
    workers: int
    """How many of its kind there are to be; for its part of its node's cores."""
    need: resources.Need
    """What Ray gives to it: memory of the host, and GPUs."""


class _Worker:
    def __init__(self, arguments: WorkerArguments) -> None:
        self._slot = arguments.slot
        self._id = WorkerId(f"{arguments.slot}-{uuid.uuid4().hex[:6]}")
        self._host = ray.util.get_node_ip_address() if arguments.network else "127.0.0.1"
        self._listen = f"{bracketed(self._host)}:0"
        self._threads = resources.threads(
            arguments.kind,
            resources.all_nodes(),
            here=ray.get_runtime_context().get_node_id(),
            cores=_usable_cores(),
            each=arguments.need,
            workers=arguments.workers,
        )
        self._token = ClusterToken.of_node(arguments.config.token_file)
        self._directory = open_directory(arguments.directory, token=self._token)
        check_token(self._directory)
        self._drain_timeout_s = arguments.config.drain_timeout_s

    def _end_with(self, worker: EndingWorker) -> None:
        """Makes :meth:`leave` and SIGTERM drain and end ``worker``, then this process. Ray constructs actors
        in the main thread, which signal handlers need."""
        self._ending = Ending(worker)
        self._ending.on_sigterm(self._drain_timeout_s)

    def leave(self, grace_s: float, heard: bool = True) -> None:
        """Begins to end the worker: see :meth:`farshore.workers.ending.Ending.begin`."""
        self._ending.begin(grace_s, heard=heard)

    def __repr__(self) -> str:
        return f"{self._slot} on {self._host} ({self._id})"


def _device(asked: str, need: resources.Need, *, option: str) -> "Device":
    """The device for this process; what ``auto`` chose is in its log. Raises InvalidRequest. Ray shows a
    worker the GPU that it gave to it, and no other: the first one of this process."""
    from farshore.workers.device import resolve

    device = resolve(asked.partition(":")[0], option=option, granted=need.gpus)
    if asked == "auto":
        _LOG.warning("%s auto chose %s", option, device)
    return device


def _usable_cores() -> int:
    """The cores that this process may use: of its affinity, and of its container's quota."""
    return max(1, min(len(os.sched_getaffinity(0)), int(get_num_cpus(override_docker_cpu_warning=True))))


class AttentionActor(_Worker):
    """An attention worker. It serves from construction on."""

    def __init__(self, arguments: WorkerArguments) -> None:
        super().__init__(arguments)
        from farshore.workers.attention import AttentionWorker

        config = arguments.config
        self._worker = AttentionWorker(
            worker=self._id,
            slot=self._slot,
            kv_memory_bytes=config.kv_memory_bytes,
            device=_device(config.attention_device, arguments.need, option="--attention-device"),
            listen=self._listen,
            threads=self._threads,
            token=self._token,
            directory=self._directory,
            on_failed=lambda: self._ending.fail(),
        )
        self._end_with(self._worker)
        Gauges(self._slot, self._sample)

    def _sample(self) -> Iterator[Sample]:
        identity = self._worker.memory()
        yield Sample("farshore_kv_budget_bytes", identity.budget_bytes)
        yield Sample("farshore_kv_free_bytes", identity.free_bytes)
        yield Sample("farshore_attended_bytes", identity.attended_bytes)


class DenseActor(_Worker):
    """A dense worker. It loads its model in a thread, and serves when that is done."""

    def __init__(self, arguments: WorkerArguments) -> None:
        super().__init__(arguments)
        from farshore.workers.dense import DenseConfig, DenseWorker
        from farshore.workers.engine.admission import EngineLimits

        config = arguments.config
        offload = config.placement == "offload"
        self._worker = DenseWorker(
            DenseConfig(
                worker=self._id,
                slot=self._slot,
                spec=config.spec,
                dtype=config.dtype,
                kv_format=config.stored_format,
                kv_memory_bytes=config.dense_budget_bytes,
                device=_device(config.device, arguments.need, option="--device"),
                offload=offload,
                shard_by=config.shard_by if offload else "range",
                listen=self._listen,
                threads=self._threads,
                token=self._token,
                limits=EngineLimits(
                    max_decode_stall_ms=config.max_decode_stall_ms,
                    speculate_tokens=config.speculate,
                    shard_grace_s=config.shard_grace_s,
                ),
            ),
            self._directory,
            host=self._host,
            on_failed=lambda: self._ending.fail(),
        )
        self._end_with(self._worker)
        threading.Thread(target=self._worker.run, name="load", daemon=True).start()
        self._tokens = (time.monotonic(), 0)
        Gauges(self._slot, self._sample)

    def _sample(self) -> Iterator[Sample]:
        now = self._worker.load_now()
        if now is None:
            return
        load, links, usage = now
        (then_s, before), now_s = self._tokens, time.monotonic()
        self._tokens = now_s, load.tokens
        yield Sample("farshore_kv_budget_bytes", usage.budget_bytes)
        yield Sample("farshore_kv_free_bytes", usage.available_bytes)
        yield Sample("farshore_requests_running", load.running)
        yield Sample("farshore_requests_waiting", load.waiting)
        yield Sample("farshore_choices_parked", load.parked)
        yield Sample("farshore_tokens", load.tokens)
        yield Sample("farshore_tokens_per_second", (load.tokens - before) / max(now_s - then_s, 1e-9))
        for link in links:
            yield Sample("farshore_shard_latency_p50_ms", link.p50_ms, link.worker_id)
            yield Sample("farshore_shard_latency_p99_ms", link.p99_ms, link.worker_id)
            yield Sample("farshore_shard_failures", link.failures, link.worker_id)


class ControllerActor:
    """The controller. Ray starts it again, with the same arguments, when its process ends."""

    def __init__(
        self,
        config: ClusterConfig,
        model: ModelConfig,
        *,
        given: Collection[Kind],
        creator: str,
        listen: str,
        state_folder: str,
    ) -> None:
        """``creator``: names the driver that starts the controller."""
        # Ray asks for the actor's __repr__ also when this constructor raises.
        self._listen = listen
        from farshore.controller.controller import Controller

        self._creator = creator
        self._controller = Controller(
            config,
            model,
            given=given,
            listen=listen,
            state_folder=state_folder,
            restarted=ray.get_runtime_context().was_current_actor_reconstructed,
        )
        # Ray starts it again; workers go on meanwhile.
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=self._end).start())

    def __repr__(self) -> str:
        return f"controller at {self._listen}"

    def address(self) -> str:
        """The HOST:PORT of its gRPC services."""
        return self._controller.address

    def directory(self) -> str:
        """The URL of the cluster's directory."""
        return self._controller.directory_url

    def creator(self) -> str:
        """The driver that started it."""
        return self._creator

    def join(self, config: ClusterConfig, given: Collection[Kind]) -> None:
        """See :meth:`farshore.controller.controller.Controller.join`."""
        self._controller.join(config, given)

    def counts(self) -> dict[Kind, int]:
        """The number of workers of each kind that there are to be."""
        return self._controller.counts()

    def problem(self, *, free: bool) -> str | None:
        """See :meth:`farshore.controller.controller.Controller.problem`."""
        return self._controller.problem(free=free)

    def events(self, since: int) -> list[Any]:
        """The events with numbers above ``since``."""
        return self._controller.events.since(since)

    def begin_down(self) -> None:
        """Begins to end the cluster, this actor included. Idempotent."""
        self._controller.begin_down()

    def down(self) -> None:
        """Ends all workers, and this controller's loop."""
        self._controller.down()

    def _end(self) -> None:
        try:
            self._controller.pause()
        finally:
            os._exit(0)
