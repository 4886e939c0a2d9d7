"""DeviceSlices: whole steps as graphs, of which few are kept."""

import pytest
import torch

from farshore.kernels.runtime.deferring import DeferringRuntime
from farshore.models.device_llama import DeviceLlama
from farshore.workers.engine.attention_model import attention_model
from farshore.workers.engine.decode.device.slices import MOST_GRAPH_ROWS, MOST_STEP_GRAPHS, DeviceSlices


@pytest.fixture
def made(tiny_model):
    """made(rows) -> (slices, their stream, the layers that were attended to in order)."""
    model = DeviceLlama(tiny_model.config, tiny_model.weights.dense())
    layout = attention_model(model.config, model.dtype).layouts[0]
    stream = DeferringRuntime(seed=1).stream()

    def make(rows):
        memory = torch.zeros(layout.block_bytes, dtype=torch.uint8)
        return DeviceSlices(model, rows, stream, memory=memory, layout=layout), stream

    return make


def run(slices, stream, shape):
    """Runs a step whose attention is the query; returns the head's input, and the layers that were called."""
    called = []

    def attend(layer):
        called.append(layer)
        slices.o.copy_(slices.q)

    slices.step(attend, shape)
    stream.record().wait()
    return slices.normed.clone(), called


def test_a_step_is_one_graph_whose_third_run_calls_nothing(made, tiny_model):
    slices, stream = made(2)
    layers = list(range(tiny_model.config.layers))
    expected, called = run(slices, stream, None)
    assert called == layers
    for calls in (layers, layers, [], []):
        found, called = run(slices, stream, "shape")
        assert called == calls
        assert torch.equal(found, expected)


def test_the_graphs_that_were_used_last_are_kept(made):
    slices, stream = made(1)
    for number in range(3 * MOST_STEP_GRAPHS):
        for _ in range(2):
            run(slices, stream, number)
            run(slices, stream, "always")
    steps = [key for key in stream._graphs if key[0] == "step"]
    assert len(steps) == MOST_STEP_GRAPHS
    assert run(slices, stream, "always")[1] == []
    assert run(slices, stream, 3 * MOST_STEP_GRAPHS - 1)[1] == []
    assert run(slices, stream, 0)[1] != []


def test_many_rows_run_without_graphs(made, tiny_model):
    slices, stream = made(MOST_GRAPH_ROWS + 128)
    for _ in range(3):
        assert run(slices, stream, "shape")[1] == list(range(tiny_model.config.layers))
    assert not stream._graphs
