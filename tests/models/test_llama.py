"""The sliced decoder compared with transformers' LlamaForCausalLM."""

import pytest
import torch

from farshore.errors import ModelError
from farshore.models.config.load import load_config
from farshore.models.files.source import resolve
from farshore.models.llama import Llama
from farshore.models.weights.load import load_model

IDS = [1, 17, 5, 96, 5, 5, 42, 0, 33, 12, 80]
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 50000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 50000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


@torch.inference_mode()
def reference(model, ids, first_position=0):
    positions = torch.arange(first_position, first_position + len(ids))[None]
    return model(torch.tensor([ids]), position_ids=positions, use_cache=False).logits[0].float()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("bias", [True, False])
def test_logits_equal_transformers(tiny, forward, tied, rope, bias):
    theirs, folder = tiny(
        tie_word_embeddings=tied, rope_parameters=ROPES[rope], attention_bias=bias, mlp_bias=bias
    )
    ours = load_model(resolve(str(folder)), dtype=torch.float32)
    for first in (0, 40):
        expected = reference(theirs, IDS, first)
        torch.testing.assert_close(forward(ours, IDS, first_position=first), expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_slice_rounds_like_transformers(tiny, rope, dtype):
    """Bit for bit with the same attention: the order of roundings is part of the contract."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen = []

    def probe(module, q, k, v, mask, **rest):
        o, _ = sdpa_attention_forward(module, q, k, v, mask, **rest)
        seen.append((*(x[0].transpose(0, 1) for x in (q, k, v)), o[0]))
        return o, None

    AttentionInterface.register("farshore_probe", probe)
    theirs, folder = tiny(dtype=dtype, rope_parameters=ROPES[rope], attention_bias=True, mlp_bias=True)
    theirs.set_attn_implementation("farshore_probe")
    expected = reference(theirs, IDS)
    loaded = load_model(resolve(str(folder)), dtype=dtype)
    ours = Llama(loaded.config, loaded.weights)  # In PyTorch: native kernels sum in another order.
    assert ours.dtype == dtype
    positions = torch.arange(len(IDS))
    h = ours.embed(torch.tensor(IDS))
    for layer, (q, k, v, o) in enumerate(seen):
        normed = ours.attention_input(layer, h)
        assert torch.equal(ours.query(layer, normed, positions), q)
        got_k, got_v = ours.key_value(layer, normed, positions)
        assert torch.equal(got_k, k)
        assert torch.equal(got_v, v)
        h = ours.finish(layer, h, o)
    assert len(seen) == ours.config.layers
    assert torch.equal(ours.logits(h), expected)


def test_sharded_safetensors_and_progress(tiny, forward):
    theirs, folder = tiny(shard="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    seen = []
    ours = load_model(resolve(str(folder)), dtype=torch.float32, progress=lambda *counts: seen.append(counts))
    torch.testing.assert_close(forward(ours, IDS), reference(theirs, IDS), atol=1e-5, rtol=1e-5)
    assert seen == [(done, len(seen)) for done in range(1, len(seen) + 1)]


def test_mistral_up_to_its_window(tmp_path, forward):
    """A window hides nothing from a sequence that is no longer than it."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(5)
    shape = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2)
    heads = dict(num_attention_heads=6, num_key_value_heads=2, sliding_window=len(IDS))
    theirs = MistralForCausalLM(MistralConfig(**shape, **heads)).eval()
    theirs.save_pretrained(tmp_path)
    source = resolve(str(tmp_path))
    with pytest.raises(ModelError, match=f"--max-model-len {len(IDS)}"):
        load_model(source, dtype=torch.float32)
    config = load_config(source, max_model_len=len(IDS))
    ours = load_model(source, dtype=torch.float32, config=config)
    torch.testing.assert_close(forward(ours, IDS), reference(theirs, IDS), atol=1e-5, rtol=1e-5)


def test_config_override_adds_positions(tiny):
    import dataclasses

    _, folder = tiny()
    source = resolve(str(folder))
    longer = dataclasses.replace(load_config(source), max_positions=200)
    model = load_model(source, dtype=torch.float32, config=longer)
    normed = torch.ones(1, 48)
    assert model.query(0, normed, torch.tensor([199])).shape == (1, 6, 8)
    with pytest.raises(IndexError):
        model.query(0, normed, torch.tensor([200]))


def test_no_rows(tiny):
    _, folder = tiny()
    model = load_model(resolve(str(folder)), dtype=torch.float32)
    none = torch.zeros(0, dtype=torch.int64)
    h = model.embed(none)
    normed = model.attention_input(0, h)
    assert model.key_value(0, normed, none)[0].shape == (0, 2, 8)
    h = model.finish(0, h, model.query(0, normed, none))
    assert model.logits(h).shape == (0, 97)


def test_slices_leave_their_arguments_alone(tiny):
    _, folder = tiny()
    model = load_model(resolve(str(folder)), dtype=torch.float32)
    positions = torch.arange(3)
    h = model.embed(torch.tensor([3, 4, 5]))
    normed = model.attention_input(0, h)
    q = model.query(0, normed, positions)
    kept = [t.clone() for t in (h, normed, q, positions)]
    model.key_value(0, normed, positions)
    model.finish(0, h, q)
    model.logits(h)
    assert all(torch.equal(a, b) for a, b in zip(kept, (h, normed, q, positions), strict=True))


def test_missing_tensor_is_named(tiny):
    from safetensors.torch import load_file, save_file

    _, folder = tiny()
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*missing"):
        load_model(resolve(str(folder)), dtype=torch.float32)


def test_wrong_shape_is_named(tiny):
    from safetensors.torch import load_file, save_file

    _, folder = tiny()
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.self_attn.k_proj.weight"] = torch.zeros(3, 48)
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"k_proj.*\[3, 48\].*\[16, 48\]"):
        load_model(resolve(str(folder)), dtype=torch.float32)


@pytest.mark.parametrize("keep", [0, 4, 200, -10])
def test_truncated_safetensors(tiny, keep):
    _, folder = tiny()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors.*download it again") as caught:
        load_model(resolve(str(folder)), dtype=torch.float32)
    assert "\n" not in str(caught.value)


def test_index_must_stay_in_its_folder(tiny):
    _, folder = tiny()
    index = folder / "model.safetensors.index.json"
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    index.write_text('{"weight_map": {"x": "../secret.safetensors"}}')
    with pytest.raises(ModelError, match="beside it"):
        load_model(resolve(str(folder)), dtype=torch.float32)
    index.write_text('{"weight_map": {"x": "gone.safetensors"}}')
    with pytest.raises(ModelError, match=r"gone\.safetensors: missing"):
        load_model(resolve(str(folder)), dtype=torch.float32)


def test_integer_weights_are_refused(tiny):
    from safetensors.torch import load_file, save_file

    _, folder = tiny()
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(48, dtype=torch.int8)
    save_file(tensors, path)
    with pytest.raises(ModelError, match="unquantised"):
        load_model(resolve(str(folder)), dtype=torch.float32)
