"""Which safetensors are read, and which refused, compared with transformers on the same folders."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from farshore.errors import ModelError
from farshore.models.files.source import ModelSource
from farshore.models.weights.load import load_model

UP = "model.layers.1.mlp.up_proj.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def load(folder, dtype=torch.float32):
    return load_model(ModelSource("tiny", folder, "hf"), dtype=dtype)


def theirs(folder, dtype=torch.float32):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype)


def check_equal(ours, model):
    """Every tensor, bit for bit."""
    state = model.state_dict()
    assert torch.equal(ours.weights.embed, state["model.embed_tokens.weight"])
    assert torch.equal(ours.weights.head, state["lm_head.weight"])
    assert torch.equal(ours.weights.norm, state["model.norm.weight"])
    names = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    names |= {part: f"self_attn.{part}_proj" for part in "qkvo"}
    names |= {part: f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    for layer, weights in enumerate(ours.weights.layers):
        for field, name in names.items():
            assert torch.equal(getattr(weights, field), state[f"model.layers.{layer}.{name}.weight"]), field


def save(tensors, path):
    save_file(tensors, path, metadata={"format": "pt"})


def other(tensors):
    return {name: tensor + 1 for name, tensor in tensors.items()}


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def untied(tiny):
    """(folder of a tiny model without tied embeddings, its tensors)."""
    _, folder = tiny(tie_word_embeddings=False)
    return folder, load_file(folder / SINGLE)


@pytest.fixture
def sharded(untied):
    """(folder, tensors, their index): all files of the model but the last have other names than usual."""
    folder, tensors = untied
    (folder / SINGLE).unlink()
    names = sorted(tensors)
    weight_map = {name: f"{'ab'[number > 5]}.safetensors" for number, name in enumerate(names)}
    for file in set(weight_map.values()):
        save({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    write_index(folder, weight_map)
    return folder, tensors, weight_map


def test_other_files_beside_it(untied):
    folder, tensors = untied
    save(other(tensors), folder / "zz.safetensors")
    save(other(tensors), folder / "consolidated.safetensors")
    check_equal(load(folder), theirs(folder))


def test_single_file_wins_over_an_old_index(untied):
    folder, tensors = untied
    save(other(tensors), folder / "old.safetensors")
    write_index(folder, dict.fromkeys(tensors, "old.safetensors"))
    check_equal(load(folder), theirs(folder))


def test_what_the_index_does_not_name_is_not_read(sharded):
    folder, tensors, _ = sharded
    save(other(tensors), folder / "c.safetensors")
    check_equal(load(folder), theirs(folder))


def test_file_named_by_the_configuration(untied):
    folder, tensors = untied
    save(other(tensors), folder / "new.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "new.safetensors"}))
    ours = load(folder)
    check_equal(ours, theirs(folder))
    assert torch.equal(ours.weights.norm, tensors["model.norm.weight"] + 1)
    for name in ("../new.safetensors", "gone.safetensors", "config.json", 3):
        (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
        with pytest.raises(ModelError, match="'transformers_weights' must name"):
            load(folder)


@pytest.mark.parametrize("moved", [UP, "lm_head.weight"])
def test_index_and_files_that_disagree_are_refused(sharded, moved):
    """transformers reads the last copy, whatever the index says; other loaders believe the index."""
    folder, tensors, weight_map = sharded
    for file in ("a.safetensors", "b.safetensors"):
        path = folder / file
        save(load_file(path) | {moved: tensors[moved]}, path)
    with pytest.raises(ModelError, match=r"lies in a\.safetensors .* and b\.safetensors"):
        load(folder)
    holder = folder / weight_map[moved]
    save({name: tensor for name, tensor in load_file(holder).items() if name != moved}, holder)
    with pytest.raises(ModelError, match=rf"which the index places in {holder.name}; download"):
        load(folder)
    write_index(folder, {name: file for name, file in weight_map.items() if name != moved})
    with pytest.raises(ModelError, match="which the index places in no file; download"):
        load(folder)


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ("consolidated.safetensors", "Mistral's own format"),
        ("pytorch_model.bin", "save_pretrained"),
        ("weights.safetensors", "are not read, as in transformers"),
    ],
)
def test_no_file_that_transformers_reads(untied, present, message):
    folder, _ = untied
    (folder / SINGLE).rename(folder / present)
    with pytest.raises(ModelError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_base_model_without_prefix(tiny):
    model, folder = tiny(tie_word_embeddings=True)
    expected = dict(model.state_dict())
    tensors = load_file(folder / SINGLE)
    for spelling in (lambda name: name.removeprefix("model."), lambda name: f"model.{name}"):
        save({spelling(name): tensor for name, tensor in tensors.items()}, folder / SINGLE)
        again = theirs(folder)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
        check_equal(load(folder), again)
    save(tensors | {"norm.weight": torch.ones(48)}, folder / SINGLE)
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' lies in .* as 'norm\.weight'"):
        load(folder)


def test_unexpected_tensors_are_ignored(untied):
    folder, tensors = untied
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.q_proj.bias": torch.ones(48),
        "position_ids": torch.arange(4),
    }
    save(tensors | extra, folder / SINGLE)
    check_equal(load(folder), theirs(folder))


@pytest.mark.parametrize("head", ["different", "equal", "absent", "alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_embeddings(tiny, forward, head, dtype):
    _, folder = tiny(tie_word_embeddings=True)
    tensors = load_file(folder / SINGLE)
    embed = tensors["model.embed_tokens.weight"]
    assert "lm_head.weight" not in tensors
    if head == "different":
        tensors["lm_head.weight"] = torch.randn(embed.shape)
    elif head == "equal":
        tensors["lm_head.weight"] = embed.clone()
    elif head == "alone":
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save(tensors, folder / SINGLE)
    ours, model = load(folder, dtype), theirs(folder, dtype)
    check_equal(ours, model)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == (head != "different")
    assert (ours.weights.head is ours.weights.embed) == ours.config.tied_embeddings == tied
    if dtype == torch.float32:
        with torch.inference_mode():
            expected = model(torch.tensor([[1, 17, 5]])).logits[0]
        torch.testing.assert_close(forward(ours, [1, 17, 5]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", UP])
def test_missing_tensor(untied, name):
    """transformers makes it up."""
    folder, tensors = untied
    del tensors[name]
    save(tensors, folder / SINGLE)
    with pytest.raises(ModelError, match=f"{name}' is missing"):
        load(folder)


@pytest.mark.parametrize(
    ("tensor", "method"),
    [
        ("model.layers.1.mlp.up_proj.qweight", "AWQ or GPTQ"),
        ("model.layers.1.mlp.up_proj.qzeros", "AWQ or GPTQ"),
        ("model.layers.1.mlp.up_proj.g_idx", "GPTQ"),
        ("model.layers.1.mlp.up_proj.weight_scale", "FP8 or compressed-tensors"),
        ("model.layers.1.mlp.up_proj.weight_scale_inv", "FP8"),
        ("model.layers.1.mlp.up_proj.weight_packed", "compressed-tensors"),
        ("model.layers.1.mlp.up_proj.weight.absmax", "bitsandbytes"),
        ("model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("model.layers.1.mlp.up_proj.SCB", "bitsandbytes"),
        ("base_model.model.model.layers.1.mlp.up_proj.lora_A.weight", "a LoRA adapter"),
    ],
)
def test_other_kinds_of_checkpoint(untied, tensor, method):
    folder, tensors = untied
    save(tensors | {tensor: torch.ones(2)}, folder / SINGLE)
    with pytest.raises(ModelError, match=rf"belongs to {method}, .* supported: bf16, f16 and f32") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_other_types(untied, dtype):
    folder, tensors = untied
    save(tensors | {UP: tensors[UP].to(dtype)}, folder / SINGLE)
    with pytest.raises(ModelError, match=r"use an unquantised model; supported: bf16, f16 and f32"):
        load(folder)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapter(untied, file):
    folder, _ = untied
    (folder / file).write_text("{}")
    with pytest.raises(ModelError, match=r"LoRA adapters are unsupported; merge it .* supported: "):
        load(folder)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_conversion(untied, stored, dtype, monkeypatch):
    """In pieces, also where the last is short."""
    monkeypatch.setattr("farshore.models.weights.safetensors._PIECE_BYTES", 1000)
    folder, tensors = untied
    save({name: tensor.to(stored) for name, tensor in tensors.items()}, folder / SINGLE)
    check_equal(load(folder, dtype), theirs(folder, dtype))


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"x": 3}',
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
        b'{"x": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_damaged_header(untied, header):
    folder, _ = untied
    (folder / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged or cut short .*; download") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
