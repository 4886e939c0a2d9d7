"""GGUF files: damage is reported, and intact files give the same bits as transformers."""

from contextlib import suppress

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.errors import ModelError
from farshore.models.config.gguf import from_gguf
from farshore.models.config.load import load_config
from farshore.models.files.gguf import GgufFile
from farshore.models.files.gguf_header import DamagedError, read_header
from farshore.models.files.source import ModelSource
from farshore.models.weights.load import load_model
from farshore.models.weights.names import expected_shapes


def written(path, *, architecture="llama", drop=(), extra=()):
    """A tiny, complete GGUF llama by gguf's own writer."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(11)
    for key, value in extra:
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    shapes = {
        "token_embd": (11, 32),
        "output_norm": (32,),
        "output": (11, 32),
        "blk.0.attn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_norm": (32,),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }
    random = np.random.default_rng(3)
    for name, shape in shapes.items():
        if name not in drop:
            writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelSource("tiny", path, "gguf")


def load(source):
    return load_model(source, dtype=torch.float32)


def test_intact_file(tmp_path):
    model = load(written(tmp_path / "m.gguf"))
    config = model.config
    assert (config.layers, config.head_dim, config.vocab, config.tied_embeddings) == (1, 8, 11, False)
    raw = GgufFile.open(tmp_path / "m.gguf").tensor("blk.0.attn_q.weight")
    # Second head: rows 8 to 15 of the file are pairs; ours are the even ones, then the odd ones.
    order = [8, 10, 12, 14, 9, 11, 13, 15]
    assert np.array_equal(model.weights.layers[0].q[8:16].numpy(), raw[order])
    assert np.array_equal(
        model.weights.layers[0].v.numpy(), GgufFile.open(tmp_path / "m.gguf").tensor("blk.0.attn_v.weight")
    )


def test_reads_metadata_as_gguf_does(demo):
    file = GgufFile.open(demo.path)
    fields = gguf.GGUFReader(demo.path).fields
    for key, field in fields.items():
        if not key.startswith("GGUF."):
            assert file.get(key) == field.contents(), key


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.3, 0.9, 0.999])
def test_truncated(tmp_path, share):
    source = written(tmp_path / "m.gguf")
    intact = source.path.read_bytes()
    source.path.write_bytes(intact[: int(len(intact) * share)])
    for read in (load_config, load):
        with pytest.raises(
            ModelError, match=r"m\.gguf: .*(cut short|not a GGUF).*download it again"
        ) as caught:
            read(source)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("junk", [b"GGUF", b"\x00" * 64, b"GGUF" + b"\xff" * 64, b"<html>not found</html>"])
def test_garbage(tmp_path, junk):
    path = tmp_path / "m.gguf"
    path.write_bytes(junk)
    with pytest.raises(ModelError, match="download it again"):
        load_config(ModelSource("m", path, "gguf"))


def test_absent_and_folder(tmp_path):
    for path in (tmp_path / "gone.gguf", tmp_path):
        with pytest.raises(ModelError, match="can't be read"):
            GgufFile.open(path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_never_escapes_as_another_error(data, tmp_path_factory):
    """Changed bytes in the header either can be read, or raise the errors that callers catch."""
    folder = tmp_path_factory.getbasetemp()
    path = folder / "fuzz.gguf"
    if not path.exists():
        written(path)
    intact = bytearray(path.read_bytes()[:2000])
    for _ in range(data.draw(st.integers(1, 4))):
        intact[data.draw(st.integers(4, len(intact) - 1))] = data.draw(st.integers(0, 255))
    try:
        header = read_header(bytes(intact))
    except DamagedError:
        return
    with suppress(ModelError):
        from_gguf(GgufFile(path, bytes(intact), header), "fuzz")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(architecture="gemma"), "'gemma' is unsupported"),
        (dict(drop=("blk.0.ffn_up",)), r"'blk\.0\.ffn_up\.weight' is missing"),
        (dict(extra=[("llama.expert_count", 8)]), "experts"),
        (dict(extra=[("general.type", "adapter")], drop=("output",)), "'adapter', not a model; merge a LoRA"),
        (dict(extra=[("split.count", 2)]), r"one of 2 parts.*-00001-of-00002\.gguf"),
        (dict(extra=[("llama.rope.scaling.type", "dynamic")]), "'dynamic' is unsupported"),
        (dict(extra=[("llama.rope.dimension_count", 4)]), "part of each head"),
        (dict(extra=[("llama.rope.freq_base", "x")]), "isn't a number"),
        (dict(extra=[("llama.attention.key_length", 16)]), "of different lengths"),
        (
            dict(extra=[(f"llama.attention.{kind}_length", 16) for kind in ("key", "value")]),
            "take weights and configuration",
        ),
    ],
)
def test_refused(tmp_path, options, message):
    with pytest.raises(ModelError, match=message) as caught:
        load(written(tmp_path / "m.gguf", **options))
    assert "\n" not in str(caught.value)


def test_missing_output_means_tied(tmp_path):
    model = load(written(tmp_path / "m.gguf", drop=("output",)))
    assert model.config.tied_embeddings and model.weights.head is model.weights.embed


@pytest.mark.heavy
def test_demo_weights_are_transformers_bits(demo):
    from transformers import AutoModelForCausalLM, GgufConfig

    theirs = AutoModelForCausalLM.from_pretrained(
        demo.path.parent,
        gguf_file=demo.path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).state_dict()
    ours = load(demo)
    names = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    names |= {part: f"self_attn.{part}_proj" for part in "qkvo"}
    names |= {part: f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    checked = 2
    assert torch.equal(ours.weights.embed, theirs["model.embed_tokens.weight"])
    assert torch.equal(ours.weights.norm, theirs["model.norm.weight"])
    for layer, weights in enumerate(ours.weights.layers):
        for field, name in names.items():
            assert torch.equal(getattr(weights, field), theirs[f"model.layers.{layer}.{name}.weight"])
            checked += 1
    assert checked == len(expected_shapes(ours.config))


@pytest.mark.heavy
@torch.inference_mode()
def test_demo_answers(demo, forward, tokenizer, encode_chat):
    model = load_model(demo, dtype=torch.float32)
    ids = encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    stream, answer = tokenizer.stream(), ""
    for _ in range(20):
        token = int(forward(model, ids)[-1].argmax())
        if token in tokenizer.eos_ids:
            break
        ids.append(token)
        answer += stream.push(token)
    assert answer + stream.finish() == "The capital of France is Paris."
