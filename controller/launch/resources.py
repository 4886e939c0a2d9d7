"""What the nodes of Ray offer, what a worker asks for, and where workers of a kind may run.

Used by ``controller`` and ``driver`` to ask for resources and to say which are missing, and by ``actors`` in
each worker's process to share its node's cores. It must not know how workers are started.

A node declares the custom resources ``dense`` and ``attention``: how many workers of each kind it takes
(``farshore node``, or ``ray start --resources``). If any node declares one of these, or ``farshore``, which
alone means "no workers here", then a worker runs only on a node that declares its kind. It asks for 1 of
that resource, for its memory, and for its part of the node's cores, so that Ray and its dashboard show what
is free. In a Ray that declares nothing, a worker runs on any node with enough memory and asks for no cores,
because the number of workers that will share a node is unknown.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray._private.state import available_resources_per_node

from farshore.controller.config import ClusterConfig
from farshore.controller.launch.ray_settings import MARK, OBJECT_STORE_BYTES
from farshore.controller.reconcile import KINDS, Kind
from farshore.models.config.model import ModelConfig
from farshore.models.files import selection
from farshore.models.files.source import resolve
from farshore.models.weights.names import parameters

PROCESS_BYTES = 320 << 20
"""Memory of a worker's process beside KV and weights: mostly PyTorch's libraries. An idle attention worker
was measured at 300 MiB."""

CUDA_PROCESS_BYTES = 4 << 30
"""Host memory of a worker that computes on a GPU, where its KV and its weights are: PyTorch's libraries for
CUDA, staging, and the pieces of the model that are being loaded. An estimate: measured on no GPU yet."""

MOST_OBJECT_STORE = 0.1
"""Part of a node's memory that Ray's object store may take without a warning. KV does not use it."""

_GRAIN = 10_000
"""Ray counts resources in units of 1/10,000."""


class Need(NamedTuple):
    """What one worker asks Ray for, beside its part of the node's cores."""

    memory_bytes: int
    """Of the host."""
    gpus: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A live node of Ray: what it has in all, or what is free there."""

    id: str
    address: str
    memory_bytes: int
    """What Ray may give to actors."""
    cores: float = 0.0
    gpus: int = 0
    """GPUs that Ray may give to actors: those that the driver shows, or as many as the node declares."""
    takes: Mapping[str, int]
    """The declared resources among KINDS and MARK, without those that are 0."""
    object_store_bytes: int = 0

    def room(self, kind: Kind, *, each: Need, declared: bool) -> int:
        """The number of workers that fit."""
        fit = self.memory_bytes // each.memory_bytes
        if each.gpus:
            fit = min(fit, self.gpus // each.gpus)
        return min(fit, self.takes.get(kind, 0)) if declared else fit


def all_nodes() -> list[Node]:
    """The live nodes, with what they have in all."""
    return [_node(node, node["Resources"]) for node in _alive()]


def free_nodes() -> list[Node]:
    """The live nodes, with what Ray has not given to actors or tasks yet."""
    free = available_resources_per_node()
    return [_node(node, free.get(node["NodeID"], {})) for node in _alive()]


def are_declared(nodes: Iterable[Node]) -> bool:
    """Whether any of the nodes declares what it takes."""
    return any(node.takes for node in nodes)


def worker_bytes(config: ClusterConfig, model: ModelConfig) -> dict[Kind, int]:
    """The host's memory that a worker of each kind asks for: its KV, its process, a dense worker's weights.
    One that computes on a GPU has KV and weights there. With ``auto`` that is unknown, and the host's memory
    is asked for. Raises ModelError if the model's files are gone."""
    attention = config.kv_memory_bytes + PROCESS_BYTES
    if config.attention_device == "cuda":
        attention = CUDA_PROCESS_BYTES
    if config.device.startswith("cuda"):
        return {"dense": CUDA_PROCESS_BYTES, "attention": attention}
    dense = config.dense_budget_bytes + PROCESS_BYTES + _weight_bytes(config, model)
    return {"dense": dense, "attention": attention}


def needs(
    config: ClusterConfig, memory: Mapping[Kind, int], nodes: Sequence[Node], counts: Mapping[Kind, int]
) -> dict[Kind, Need]:
    """What a worker of each kind asks for. ``memory``: of :func:`worker_bytes`. ``nodes``: of
    :func:`all_nodes`. ``counts``: the workers that there are to be. With ``--device auto`` each dense worker
    asks for a GPU if the nodes have one for each, beside those of the attention workers; else none does."""
    attention = Need(memory["attention"], int(config.attention_device == "cuda"))
    dense = Need(memory["dense"], int(config.device != "cpu"))
    if config.device == "auto":
        declared = are_declared(nodes)
        left = beside(nodes, "attention", workers=counts["attention"], each=attention, declared=declared)
        room = sum(node.room("dense", each=dense, declared=declared) for node in left)
        dense = dense._replace(gpus=int(room >= counts["dense"]))
    return {"dense": dense, "attention": attention}


def asked(kind: Kind, nodes: Sequence[Node], *, each: Need, workers: int) -> dict[str, Any]:
    """The resources and the scheduling strategy of an actor, as options of Ray. ``nodes``: of
    :func:`all_nodes`. ``workers``: how many of the kind there are to be.

    A worker's cores are those of its node over the number of workers that the node takes. Ray is asked
    before the node is known, so the smallest such share is asked for."""
    options = {"num_cpus": 0.0, "memory": each.memory_bytes, "scheduling_strategy": "SPREAD"}
    if each.gpus:
        options |= {"num_gpus": each.gpus}
    if are_declared(nodes):
        shares = [node.cores / _takes(node) for node in nodes if node.takes.get(kind)]
        cores = int(min(shares, default=0.0) * _GRAIN) / _GRAIN
        return options | {"num_cpus": cores, "resources": {kind: 1}}
    if kind == "dense" and workers == 1:
        # Near the controller, whose host has the model's files.
        return options | {"scheduling_strategy": "DEFAULT"}
    return options


def threads(kind: Kind, nodes: Sequence[Node], *, here: str, cores: int, each: Need, workers: int) -> int:
    """The number of computing threads of a worker that has just started on the node ``here``: its part of the
    ``cores`` that its process may use. ``workers``: how many of the kind there are to be in the cluster; Ray
    spreads them, so that a small node gets no more than fit there."""
    declared = are_declared(nodes)
    room = {node.id: node.room(kind, each=each, declared=declared) for node in nodes}
    return max(1, cores // max(1, spread(room, workers).get(here, 1)))


def spread(room: Mapping[str, int], count: int) -> dict[str, int]:
    """How many of ``count`` workers each node gets, if each worker goes to a node that has the fewest and has
    room. ``room``: node -> most workers. Workers that fit nowhere are left out."""
    got = dict.fromkeys(room, 0)
    open_nodes = [(0, node) for node, most in sorted(room.items()) if most > 0]
    while open_nodes and count > 0:
        taken, node = heapq.heappop(open_nodes)
        got[node] = taken + 1
        count -= 1
        if got[node] < room[node]:
            heapq.heappush(open_nodes, (got[node], node))
    return got


def beside(nodes: Iterable[Node], kind: Kind, *, workers: int, each: Need, declared: bool) -> list[Node]:
    """What the nodes have left when ``workers`` of a kind were placed there."""
    nodes = list(nodes)
    room = {node.id: node.room(kind, each=each, declared=declared) for node in nodes}
    placed = spread(room, workers)
    return [
        replace(
            node,
            memory_bytes=node.memory_bytes - placed[node.id] * each.memory_bytes,
            gpus=node.gpus - placed[node.id] * each.gpus,
        )
        for node in nodes
    ]


def missing(kind: Kind, nodes: Sequence[Node], *, workers: int, each: Need, declared: bool) -> str | None:
    """What is missing for ``workers`` of a kind, and the fix; None if they fit. ``declared``: whether they
    run only on nodes that declare their kind."""
    if sum(node.room(kind, each=each, declared=declared) for node in nodes) >= workers:
        return None
    plural = workers > 1
    need = f"{_mib(each.memory_bytes)} of memory" + (" and a GPU" if each.gpus else "")
    need += f" and 1 of Ray's resource {kind!r}" if declared else ""
    total = f"{_mib(workers * each.memory_bytes)} in all"
    have = ", ".join(
        _offered(node, kind, each, declared=declared) for node in sorted(nodes, key=lambda n: n.address)
    )
    fix = f"lower --kv-memory or --{kind}-workers, or add nodes"
    if declared and sum(node.takes.get(kind, 0) for node in nodes) < workers:
        fix = (
            f"add nodes with `farshore node --ray-address HOST:PORT --{kind} N` (or `ray start --resources "
            f"'{{\"{kind}\": N}}'`), or lower --{kind}-workers"
        )
    if each.gpus and sum(node.gpus for node in nodes if not declared or node.takes.get(kind)) < workers:
        option = "--device" if kind == "dense" else "--attention-device"
        fix = (
            f"add nodes with GPUs that take {kind} workers (nvidia-smi lists them there; in Kubernetes: "
            f"{kind}.gpu.enabled), or use {option} cpu"
        )
    return (
        f"{workers} {kind} worker{'s' if plural else ''} with {need}{' each' if plural else ''} ({total}) "
        f"do not fit: Ray has {have or 'no node at all'}; {fix}"
    )


def warnings(nodes: Iterable[Node]) -> list[str]:
    """What an operator of a joined Ray should know about its nodes."""
    nodes = list(nodes)
    told = []
    large = [node for node in nodes if node.object_store_bytes > MOST_OBJECT_STORE * _total_bytes(node)]
    if large:
        told.append(
            f"Ray's object store, which KV does not use, takes {_mib(large[0].object_store_bytes)} of "
            f"{large[0].address}'s memory: start nodes with `farshore node`, or with "
            f"`ray start --object-store-memory {OBJECT_STORE_BYTES}`"
        )
    if not are_declared(nodes):
        told.append(
            "no node of this Ray declares the resources 'dense' and 'attention': workers run wherever there "
            "is memory, and Ray counts no cores for them; start nodes with `farshore node`"
        )
    return told


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _node(node: Mapping[str, Any], has: Mapping[str, float]) -> Node:
    return Node(
        id=node["NodeID"],
        address=node["NodeManagerAddress"],
        memory_bytes=int(has.get("memory", 0)),
        cores=has.get("CPU", 0.0),
        gpus=int(has.get("GPU", 0.0)),
        takes={name: int(has[name]) for name in (*KINDS, MARK) if has.get(name, 0) >= 1},
        object_store_bytes=int(has.get("object_store_memory", 0)),
    )


def _takes(node: Node) -> int:
    return sum(node.takes.get(kind, 0) for kind in KINDS)


def _total_bytes(node: Node) -> int:
    return node.memory_bytes + node.object_store_bytes


def _offered(node: Node, kind: Kind, each: Need, *, declared: bool) -> str:
    gpus = f" and {node.gpus or 'no'} GPU{'s' if node.gpus > 1 else ''}" if each.gpus else ""
    resource = f" and {kind} {node.takes.get(kind, 0)}" if declared else ""
    return f"{_mib(node.memory_bytes)}{gpus}{resource} on {node.address}"


def _weight_bytes(config: ClusterConfig, model: ModelConfig) -> int:
    """The memory of the weights: of GGUF files their size, since quantised matrices stay as they are stored;
    in float32 nothing stays quantised."""
    source = resolve(config.spec.model, revision=config.spec.revision)
    if source.kind == "gguf" and config.dtype == "bfloat16":
        path = Path(source.path)
        return sum(path.with_name(part).stat().st_size for part in selection.gguf_parts(path.name))
    return parameters(model) * (4 if config.dtype == "float32" else 2)


def _mib(count_bytes: int) -> str:
    return f"{count_bytes / (1 << 20):,.0f} MiB"
