"""DevicePlanRoom: plans lie at the same addresses, and the deferring runtime finds a copy that comes too
early."""

import pytest
import torch

from farshore.kernels.runtime.deferring import DeferringRuntime, OrderError
from farshore.workers.engine.decode.device.plan_room import DevicePlanRoom


def tables(value, size=100):
    return torch.full((size,), value, dtype=torch.uint8)


def steps(runtime, room, stream, values):
    """What a graph reads of the plans of successive steps."""
    read = torch.zeros(100, dtype=torch.uint8)
    found = []
    for value in values:
        on_device, _ = room.take(tables(value), scratch=8, shape="shape")
        stream.replay("step", lambda on_device=on_device: read.copy_(on_device))
        stream.record().wait()
        found.append(int(read[0]) if (read == read[0]).all() else None)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_a_graph_reads_each_step_s_plan(seed):
    runtime = DeferringRuntime(seed=seed)
    stream = runtime.stream()
    assert steps(runtime, DevicePlanRoom(runtime, stream), stream, range(1, 7)) == list(range(1, 7))


def test_a_plan_that_is_copied_on_another_stream_is_found():
    found = []
    for seed in range(8):
        runtime = DeferringRuntime(seed=seed)
        room = DevicePlanRoom(runtime, runtime.stream())
        try:
            found.append(steps(runtime, room, runtime.stream(), range(1, 7)))
        except OrderError:
            found.append(None)
    assert any(values != list(range(1, 7)) for values in found)


def test_a_plan_that_replaces_one_in_use_is_found():
    runtime = DeferringRuntime(seed=0)
    room = DevicePlanRoom(runtime, runtime.stream())
    room.take(tables(1), scratch=8, shape="shape")
    with pytest.raises(OrderError, match="overwrites a pinned buffer"):
        room.take(tables(2), scratch=8, shape="shape")


def test_memory_grows_under_another_shape():
    runtime = DeferringRuntime(seed=0)
    stream = runtime.stream()
    room = DevicePlanRoom(runtime, stream)
    assert room.shape is None
    places, shapes = [], []
    for size, scratch in ((100, 8), (90, 7), (1 << 15, 8), (100, 9)):
        on_device, numbers = room.take(tables(1, size), scratch=scratch, shape="shape")
        assert on_device.numel() == size and numbers.shape == (scratch,)
        assert numbers.dtype == torch.float32
        stream.record().wait()
        places.append((on_device.data_ptr(), numbers.data_ptr()))
        shapes.append(room.shape)
    assert places[0] == places[1] and shapes[0] == shapes[1]
    assert len(set(places)) == len(set(shapes)) == 3
