"""What workers ask Ray for, on which nodes they fit, and how they share a node's cores."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farshore.controller.config import ClusterConfig
from farshore.controller.launch import resources
from farshore.controller.launch.ray_settings import MARK
from farshore.controller.launch.resources import Need, Node
from farshore.model_spec import ModelSpec
from farshore.models.config.load import load_spec

GIB = 1 << 30


def node(name, memory_bytes, *, cores=2.0, gpus=0, store_bytes=0, **takes):
    return Node(
        id=name,
        address=name,
        memory_bytes=memory_bytes,
        cores=cores,
        gpus=gpus,
        takes=takes,
        object_store_bytes=store_bytes,
    )


def missing(kind, nodes, workers, each_bytes=GIB, gpus=0):
    declared = resources.are_declared(nodes)
    return resources.missing(kind, nodes, workers=workers, each=Need(each_bytes, gpus), declared=declared)


def asked(kind, nodes, workers=2, gpus=0):
    return resources.asked(kind, nodes, each=Need(GIB, gpus), workers=workers)


def threads(kind, nodes, here, workers, cores=16):
    return resources.threads(kind, nodes, here=here, cores=cores, each=Need(GIB), workers=workers)


@pytest.mark.parametrize(
    ("nodes", "workers"),
    [
        ([node("a", 4 * GIB)], 4),
        ([node("a", GIB), node("b", 3 * GIB)], 4),
        ([], 0),
        ([node("a", 4 * GIB, attention=2), node("b", 9 * GIB, dense=1), node("c", GIB, attention=9)], 3),
    ],
)
def test_workers_that_fit(nodes, workers):
    assert missing("attention", nodes, workers) is None


@pytest.mark.parametrize(
    ("nodes", "workers", "each_bytes", "expected"),
    [
        (
            [node("10.0.0.1", 3 * GIB)],
            1,
            4 * GIB,
            "4,096 MiB of memory (4,096 MiB in all) do not fit: Ray has ",
        ),
        # Enough memory in all, but on no node enough for one worker.
        (
            [node(name, 3 * GIB) for name in "abc"],
            2,
            4 * GIB,
            "3,072 MiB on a, 3,072 MiB on b, 3,072 MiB on c",
        ),
        ([node("a", 4 * GIB - 1)], 1, 4 * GIB, "4,096 MiB on a"),
        ([], 2, GIB, "no node at all"),
        ([node("a", GIB, attention=9)], 2, GIB, "1,024 MiB and attention 9 on a; lower --kv-memory"),
    ],
)
def test_too_little_memory_is_told_with_the_fix(nodes, workers, each_bytes, expected):
    message = missing("attention", nodes, workers, each_bytes)
    assert expected in message
    assert "lower --kv-memory or --attention-workers" in message and "farshore node" not in message


@pytest.mark.parametrize("kind", ["dense", "attention"])
@pytest.mark.parametrize("takes", [{MARK: 1}, {"attention": 1, "dense": 1}])
def test_a_missing_resource_is_named_with_the_fix(kind, takes):
    """Also if the nodes declare nothing but that they take no workers."""
    message = missing(kind, [node("a", 9 * GIB, **takes)], 2)
    have = f"{kind} {takes.get(kind, 0)} on a"
    fixes = (f"farshore node --ray-address HOST:PORT --{kind} N", f"'{{\"{kind}\": N}}'", f"--{kind}-workers")
    for part in (f"1 of Ray's resource '{kind}' each", have, *fixes):
        assert part in message


def test_workers_of_one_kind_leave_less_for_the_other():
    nodes = [node("a", 3 * GIB, attention=9, dense=9)]
    left = resources.beside(nodes, "dense", workers=1, each=Need(2 * GIB), declared=True)
    assert missing("attention", left, 1) is None
    assert "1,024 MiB and attention 9 on a" in missing("attention", left, 2)


@pytest.mark.parametrize(
    ("kind", "nodes", "workers", "parts"),
    [
        (
            "dense",
            [node("a", 9 * GIB)],
            1,
            ("1 dense worker with", "and a GPU (", "9,216 MiB and no GPU on a;", "use --device cpu"),
        ),
        (
            "dense",
            [node("a", 9 * GIB, gpus=1, dense=2), node("b", 9 * GIB, gpus=4, attention=4)],
            2,
            (
                "and a GPU and 1 of Ray's resource 'dense' each",
                "and 1 GPU and dense 2 on a",
                "dense.gpu.enabled",
            ),
        ),
        ("attention", [node("a", GIB, gpus=2)], 3, ("and 2 GPUs on a", "use --attention-device cpu")),
        # Enough GPUs, too little memory.
        ("attention", [node("a", GIB, gpus=2)], 2, ("and 2 GPUs on a; lower --kv-memory",)),
    ],
)
def test_missing_gpus_are_told_with_the_fix(kind, nodes, workers, parts):
    message = missing(kind, nodes, workers, gpus=1)
    assert all(part in message for part in parts), message
    assert "GPU" not in (missing(kind, nodes, 100) or "")


def test_workers_with_a_gpu_fit_and_leave_fewer_gpus():
    nodes = [node("a", 9 * GIB, gpus=2, dense=1, attention=1), node("b", 9 * GIB, attention=9)]
    assert missing("dense", nodes, 1, gpus=1) is None
    assert missing("attention", nodes, 1, gpus=1) is None
    left = resources.beside(nodes, "dense", workers=1, each=Need(GIB, 1), declared=True)
    assert [each.gpus for each in left] == [1, 0]
    assert asked("dense", nodes, gpus=1)["num_gpus"] == 1 and "num_gpus" not in asked("dense", nodes)


@pytest.mark.parametrize(
    ("options", "gpus", "expected"),
    [
        ({}, (0,), (0, 0)),
        ({}, (2,), (1, 0)),
        # One engine would be left without: all compute on CPUs.
        ({"dense_workers": 2}, (1,), (0, 0)),
        ({"dense_workers": 2}, (1, 1), (1, 0)),
        ({"device": "cpu"}, (2,), (0, 0)),
        ({"kv_format": "int8"}, (2,), (1, 0)),
        ({"kv_format": "int4"}, (2,), (1, 0)),
        ({"device": "cuda"}, (0,), (1, 0)),
        ({"device": "cuda:1"}, (0,), (1, 0)),
        ({"attention_device": "cuda"}, (2,), (0, 1)),
        ({"attention_device": "cuda"}, (2, 1), (1, 1)),
        ({"device": "cuda", "attention_device": "cuda"}, (0,), (1, 1)),
    ],
)
def test_which_workers_ask_for_a_gpu(options, gpus, expected):
    config = ClusterConfig(**options)
    nodes = [node(str(index), 9 * GIB, gpus=count) for index, count in enumerate(gpus)]
    counts = {"dense": config.dense_workers, "attention": config.attention_workers}
    needs = resources.needs(config, {"dense": 2 * GIB, "attention": GIB}, nodes, counts)
    assert (needs["dense"].gpus, needs["attention"].gpus) == expected
    assert (needs["dense"].memory_bytes, needs["attention"].memory_bytes) == (2 * GIB, GIB)


def test_workers_ask_for_their_resource_memory_and_cores():
    """The cores are the smallest share, so that on every node as many workers fit as it declares."""
    nodes = [
        node("a", 8 * GIB, cores=16.0, attention=2),
        node("b", 8 * GIB, cores=6.0, attention=4),
        node("c", 8 * GIB, cores=3.0, dense=2, attention=1),
        node("d", 8 * GIB, cores=0.5, **{MARK: 1}),
    ]
    attention, dense = asked("attention", nodes), asked("dense", nodes)
    assert attention == {
        "resources": {"attention": 1},
        "num_cpus": 1.0,
        "memory": GIB,
        "scheduling_strategy": "SPREAD",
    }
    assert dense["resources"] == {"dense": 1} and dense["num_cpus"] == 1.0
    for each in nodes:
        used = each.takes.get("attention", 0) * attention["num_cpus"]
        assert used + each.takes.get("dense", 0) * dense["num_cpus"] <= each.cores or each.id == "d"


@given(st.lists(st.tuples(st.integers(0, 64), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5))
def test_a_node_has_cores_for_all_that_it_declares(shapes):
    nodes = [
        node(str(n), GIB, cores=float(cores), **{k: v for k, v in (("dense", d), ("attention", a)) if v})
        for n, (cores, d, a) in enumerate(shapes)
    ]
    cpus = {kind: asked(kind, nodes)["num_cpus"] for kind in ("dense", "attention")}
    for each in nodes:
        assert sum(each.takes.get(kind, 0) * cpus[kind] for kind in cpus) <= each.cores + 1e-9


def test_nodes_that_declare_nothing_take_any_worker():
    nodes = [node("a", 4 * GIB), node("b", 4 * GIB)]
    for kind in ("dense", "attention"):
        options = asked(kind, nodes)
        assert "resources" not in options and options["num_cpus"] == 0 and options["memory"] == GIB
    # A single dense worker stays near the model's files.
    strategies = [asked("dense", nodes, workers=n)["scheduling_strategy"] for n in (1, 2)]
    assert strategies == ["DEFAULT", "SPREAD"]


def test_threads_are_a_share_of_the_workers_own_node():
    uneven = [node("large", 64 * GIB, attention=6), node("small", 64 * GIB, attention=2)]
    assert threads("attention", uneven, "large", 8, cores=32) == 32 // 6
    assert threads("attention", uneven, "small", 8, cores=8) == 8 // 2
    # Fewer workers than the nodes take: one on each.
    assert [threads("attention", uneven, each, 2) for each in ("large", "small")] == [16, 16]
    # Memory limits, too, and more workers than cores get a thread each.
    plain = [node("large", 9 * GIB), node("small", GIB)]
    assert [threads("attention", plain, each, 5) for each in ("large", "small")] == [4, 16]
    assert threads("attention", plain, "large", 1000, cores=2) == 1
    # On a node that joined meanwhile.
    assert threads("dense", plain, "unknown", 3, cores=4) == 4


@given(st.dictionaries(st.text(max_size=2), st.integers(0, 6), max_size=6), st.integers(0, 40))
def test_spread_is_as_even_as_the_room_allows(room, count):
    got = resources.spread(room, count)
    assert sum(got.values()) == min(count, sum(room.values()))
    assert all(0 <= got[each] <= room[each] for each in room)
    highest = max(got.values(), default=0)
    assert all(got[each] >= highest - 1 for each in room if got[each] < room[each])


def test_a_dense_worker_also_asks_for_its_weights():
    """Quantised matrices stay as the file has them, except in float32."""

    def weights(dtype):
        config = ClusterConfig(spec=ModelSpec(), dtype=dtype)
        source, model = load_spec(config.spec)
        need = resources.worker_bytes(config, model)
        assert need["attention"] == config.kv_memory_bytes + resources.PROCESS_BYTES
        return need["dense"] - need["attention"], Path(source.path).stat().st_size

    stored, file_bytes = weights("bfloat16")
    assert stored == file_bytes
    assert weights("float32")[0] == pytest.approx(4 * 134.5e6, rel=0.01)


def test_a_worker_on_a_gpu_has_weights_and_kv_there():
    model = load_spec(ModelSpec())[1]
    config = ClusterConfig(device="cuda", attention_device="cuda", kv_memory_bytes=64 * GIB)
    both = resources.worker_bytes(config, model)
    assert both == {"dense": resources.CUDA_PROCESS_BYTES, "attention": resources.CUDA_PROCESS_BYTES}
    # What auto chooses is unknown when the memory is asked for.
    on_cpu = resources.worker_bytes(ClusterConfig(device="cpu"), model)
    assert resources.worker_bytes(ClusterConfig(), model) == on_cpu


def test_an_operator_is_told_what_ray_takes_and_that_nodes_declare_nothing():
    (store, nothing) = resources.warnings([node("10.0.0.1", 7 * GIB, store_bytes=3 * GIB), node("b", GIB)])
    assert "3,072 MiB of 10.0.0.1's memory" in store and "--object-store-memory" in store
    assert "'dense' and 'attention'" in nothing and "farshore node" in nothing
    assert resources.warnings([node("a", GIB, store_bytes=80 << 20, **{MARK: 1})]) == []
