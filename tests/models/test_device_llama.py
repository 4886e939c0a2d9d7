"""DeviceLlama: the slices of Llama in fewer calls."""

import pytest
import torch

from farshore.models.config.model import ModelConfig
from farshore.models.config.rope import RopeConfig
from farshore.models.device_llama import DeviceLlama, joined
from farshore.models.llama import LayerWeights, Llama, LlamaWeights

CONFIG = ModelConfig(
    name="random",
    layers=2,
    hidden=48,
    q_heads=6,
    kv_heads=2,
    head_dim=16,
    intermediate=80,
    vocab=97,
    max_positions=64,
    rms_eps=1e-5,
    rope=RopeConfig(theta=10000.0),
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}


def random_weights(dtype, biases):
    made = torch.Generator().manual_seed(1)

    def weights(*shape):
        return (torch.randn(*shape, generator=made) * shape[-1] ** -0.5).to(dtype)

    c, heads, groups = CONFIG, CONFIG.q_heads * CONFIG.head_dim, CONFIG.kv_heads * CONFIG.head_dim
    sizes = {"q": heads, "k": groups, "v": groups, "o": c.hidden, "gate": c.intermediate, "down": c.hidden}

    def layer():
        return LayerWeights(
            weights(c.hidden),
            weights(heads, c.hidden),
            weights(groups, c.hidden),
            weights(groups, c.hidden),
            weights(c.hidden, heads),
            weights(c.hidden),
            weights(c.intermediate, c.hidden),
            weights(c.intermediate, c.hidden),
            weights(c.hidden, c.intermediate),
            **{f"{name}_bias": weights(sizes[name]) for name in biases},
        )

    return LlamaWeights(
        weights(c.vocab, c.hidden), (layer(), layer()), weights(c.hidden), weights(c.vocab, c.hidden)
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("biases", [(), ("q", "v", "gate"), ("k", "o", "down")])
@pytest.mark.parametrize("rows", [1, 5])
def test_its_slices_equal_those_of_llama(dtype, biases, rows):
    weights = random_weights(dtype, biases)
    plain, device = Llama(CONFIG, weights), DeviceLlama(CONFIG, weights)
    made = torch.Generator().manual_seed(2)
    h = torch.randn(rows, CONFIG.hidden, generator=made).to(dtype)
    o = torch.randn(rows, CONFIG.q_heads, CONFIG.head_dim, generator=made).to(dtype)
    positions = torch.arange(rows) * 7

    def equal(ours, theirs):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[dtype])

    for layer in range(CONFIG.layers):
        normed = plain.attention_input(layer, h)
        assert torch.equal(device.attention_input(layer, h), normed)
        equal(device.query(layer, normed, positions), plain.query(layer, normed, positions))
        equal(device.key_value(layer, normed, positions), plain.key_value(layer, normed, positions))
        equal(device.project(layer, h, positions), plain.project(layer, h, positions))
        out = tuple(torch.empty_like(part) for part in plain.project(layer, h, positions))
        equal(device.project(layer, h, positions, out=out), plain.project(layer, h, positions))
        finished = plain.finish(layer, h, o)
        equal(device.finish(layer, h, o), finished)
        in_place = h.clone()
        assert device.finish(layer, in_place, o, out=in_place) is in_place
        equal(in_place, finished)
    equal(device.logits(h), plain.logits(h))


def test_joined_weights_are_not_copied_again():
    layer = joined(random_weights(torch.float32, ()).layers[0])
    assert layer.q.untyped_storage().data_ptr() == layer.v.untyped_storage().data_ptr()
    again = joined(layer)
    assert [getattr(again, name) is getattr(layer, name) for name in ("q", "k", "v", "gate", "up")] == [
        True
    ] * 5
