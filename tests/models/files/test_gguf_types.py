"""Every type of GGUF tensor: the values of ``gguf`` and, where it reads them, of transformers."""

import gguf
import numpy as np
import pytest
import torch

from farshore.errors import ModelError
from farshore.models.files.gguf import DEQUANTISED, GgufFile
from farshore.models.files.source import ModelSource
from farshore.models.llama import as_tensor
from farshore.models.weights.load import load_model

TYPES = [kind.name for kind in gguf.GGMLQuantizationType]
UP, Q = "blk.0.ffn_up.weight", "blk.0.attn_q.weight"
HIDDEN, ROWS = 256, 512


def blocks(kind, shape, seed):
    """Random weights as ``kind`` stores them."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(shape, dtype=np.float32) * 0.1
    try:
        return gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    except NotImplementedError:
        pass
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = random.integers(0, 256, (*shape[:-1], shape[-1] // block * block_bytes), dtype=np.uint8)
    if kind in DEQUANTISED:
        # Random scales are NaN or infinite now and then: such blocks are made zeros.
        rows = data.reshape(-1, block_bytes)
        with np.errstate(all="ignore"):
            finite = np.isfinite(gguf.dequantize(rows, gguf.GGMLQuantizationType[kind])).all(axis=-1)
        rows[~finite] = 0
    return data


def write(path, kind, *, endian=gguf.GGUFEndian.LITTLE, parts=0, extra=()):
    """A tiny llama with matrices of type ``kind``. Returns the tensors as stored."""
    writer = gguf.GGUFWriter(path, "llama", endianess=endian, split_max_tensors=parts)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(ROWS)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    writer.add_token_list([f"t{i}" for i in range(64)])
    writer.add_tokenizer_model("gpt2")
    shapes = {
        "token_embd": (64, HIDDEN),
        "output_norm": (HIDDEN,),
        "output": (64, HIDDEN),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_v": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.ffn_gate": (ROWS, HIDDEN),
        "blk.0.ffn_up": (ROWS, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, ROWS),
        **dict(extra),
    }
    stored = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        raw = blocks(kind if len(shape) > 1 else "F32", shape, seed)
        raw_dtype = gguf.GGMLQuantizationType[kind] if raw.dtype == np.uint8 else None
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=raw_dtype)
        stored[f"{name}.weight"] = raw
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def load(path, dtype=torch.float32):
    return load_model(ModelSource("tiny", path, "gguf"), dtype=dtype)


def test_all_types_are_either_read_or_refused():
    """A newer gguf that dequantises more shows up here."""
    for kind in gguf.GGMLQuantizationType:
        _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError:
            assert kind.name not in DEQUANTISED
        else:
            assert kind.name in DEQUANTISED


@pytest.mark.parametrize("kind", DEQUANTISED)
def test_values(tmp_path, kind, monkeypatch):
    """In several pieces, the last of them short."""
    monkeypatch.setattr("farshore.models.files.gguf._PIECE_ELEMENTS", 20_000)
    path = tmp_path / "m.gguf"
    stored = write(path, kind)
    expected = gguf.dequantize(stored[UP], gguf.GGMLQuantizationType[kind])
    assert np.isfinite(expected).all() and expected.any()
    assert np.array_equal(GgufFile.open(path).tensor(UP), expected)
    for dtype in (torch.float32, torch.bfloat16):
        weights = load(path, dtype).weights
        assert torch.equal(as_tensor(weights.layers[0].up), torch.from_numpy(expected).to(dtype))


@pytest.mark.parametrize("kind", DEQUANTISED)
def test_transformers_values(tmp_path, kind):
    from transformers import AutoModelForCausalLM, GgufConfig

    path = tmp_path / "m.gguf"
    write(path, kind)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="m.gguf",
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).state_dict()
    ours = load(path).weights
    assert torch.equal(ours.embed, theirs["model.embed_tokens.weight"])
    assert torch.equal(ours.head, theirs["lm_head.weight"])
    for field in "qkvo":
        assert torch.equal(
            getattr(ours.layers[0], field), theirs[f"model.layers.0.self_attn.{field}_proj.weight"]
        )
    for field in ("gate", "up", "down"):
        assert torch.equal(getattr(ours.layers[0], field), theirs[f"model.layers.0.mlp.{field}_proj.weight"])


@pytest.mark.parametrize("kind", sorted(set(TYPES) - set(DEQUANTISED)))
def test_refused_types(tmp_path, kind):
    path = tmp_path / "m.gguf"
    write(path, kind)
    with pytest.raises(
        ModelError, match=rf"is {kind}, which is unsupported; .* supported: F32, F16,"
    ) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_unknown_type(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, "Q4_0")
    data = path.read_bytes()
    begin = data.index(UP.encode()) + len(UP) + 4 + 2 * 8
    path.write_bytes(data[:begin] + (999).to_bytes(4, "little") + data[begin + 4 :])
    with pytest.raises(ModelError, match=r"unknown type 999; use a file of another quantisation"):
        load(path)


def test_big_endian(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, "F32", endian=gguf.GGUFEndian.BIG)
    with pytest.raises(
        ModelError, match=r"big-endian GGUF is unsupported; convert it with gguf-convert-endian"
    ):
        load(path)


@pytest.mark.parametrize("name", ["blk.0.attn_q_norm", "blk.0.attn_q.lora_a", "blk.1.ffn_up", "surprise"])
def test_tensors_that_the_model_does_not_use(tmp_path, name):
    """llama.cpp refuses them too: they would change the result."""
    path = tmp_path / "m.gguf"
    write(path, "F32", extra=[(name, (HIDDEN,))])
    with pytest.raises(ModelError, match=rf"'{name}\.weight' is of no Llama decoder with this configuration"):
        load(path)


@pytest.fixture
def split(tmp_path):
    """(the parts' paths, the same model in one file)."""
    write(tmp_path / "whole.gguf", "Q8_0")
    write(tmp_path / "model.gguf", "Q8_0", parts=5)
    return sorted(tmp_path.glob("model-*.gguf")), tmp_path / "whole.gguf"


def test_split_files(split):
    parts, whole = split
    assert [path.name for path in parts] == [f"model-{n:05}-of-00003.gguf" for n in (1, 2, 3)]
    expected = load(whole)
    for given in parts:
        model = load(given)
        assert model.content == expected.content
        assert torch.equal(model.weights.embed, expected.weights.embed)
        assert torch.equal(model.weights.layers[0].down, expected.weights.layers[0].down)


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_missing_part(split, gone):
    parts, _ = split
    parts[gone].unlink()
    with pytest.raises(ModelError, match=rf"{parts[gone].name}: is missing beside .* download all 3 parts"):
        load(parts[gone - 1])


def test_parts_that_do_not_belong_together(split, tmp_path):
    parts, whole = split
    second = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(ModelError, match=r"-00002-.* says that it is part 2 \(from 0\) of 3"):
        load(parts[0])
    parts[1].write_bytes(whole.read_bytes())
    with pytest.raises(ModelError, match=r"-00002-.* says that it is part None \(from 0\) of None"):
        load(parts[0])
    parts[1].write_bytes(second[:-100])
    with pytest.raises(ModelError, match=r"-00002-.* cut short"):
        load(parts[0])
    parts[1].write_bytes(second)
    renamed = parts[0].rename(tmp_path / "first.gguf")
    with pytest.raises(ModelError, match=r"first\.gguf: is one of 3 parts of a model, and its name must end"):
        load(renamed)


def test_parts_with_another_count_of_tensors(split):
    parts, _ = split
    key = b"split.tensors.count"
    for path in parts:
        data = path.read_bytes()
        begin = data.index(key) + len(key) + 4
        path.write_bytes(data[:begin] + (13).to_bytes(4, "little") + data[begin + 4 :])
    with pytest.raises(ModelError, match=r"the parts have 12 tensors, not 13"):
        load(parts[0])
