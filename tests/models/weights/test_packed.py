"""Quantised GGUF models stay quantised in memory in bfloat16, and have gguf's values."""

import gguf
import numpy as np
import pytest
import torch

from farshore.models.files.gguf import GgufFile
from farshore.models.files.source import ModelSource
from farshore.models.weights.load import load_model

pytest.importorskip("farshore.kernels.cpu.packed", reason="the native kernels are not built here")

TYPES = {"ffn_down": "Q6_K", "attn_v": "Q6_K", "attn_output": "Q8_0", "attn_k": "Q5_0", "token_embd": "Q6_K"}
"""ggml's types of a Q4_K_M file, with others; the rest is Q4_K."""


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> GgufFile:
    """One layer of hidden size 256 with random blocks and tied embeddings."""
    path = tmp_path_factory.mktemp("packed") / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(300)
    shapes = {"token_embd": (300, 256), "blk.0.attn_q": (256, 256), "blk.0.attn_k": (128, 256)}
    shapes |= {"blk.0.attn_v": (128, 256), "blk.0.attn_output": (256, 256), "blk.0.ffn_gate": (512, 256)}
    shapes |= {"blk.0.ffn_up": (512, 256), "blk.0.ffn_down": (256, 512)}
    random = np.random.default_rng(3)
    for name, (out, inner) in shapes.items():
        kind = gguf.GGMLQuantizationType[TYPES.get(name.rpartition(".")[2], "Q4_K")]
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (out, inner // weights, size), dtype=np.uint8)
        for at in {"Q6_K": (208,), "Q4_K": (0, 2)}.get(kind.name, (0,)):
            blocks[..., at : at + 2] = np.array([1e-4], np.float16).view(np.uint8)
        writer.add_tensor(f"{name}.weight", blocks.reshape(out, -1), raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile.open(path)


def loaded(file: GgufFile, dtype: torch.dtype):
    return load_model(ModelSource("m", file.path, "gguf"), dtype=dtype).weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_are_ggufs(file, dtype):
    weights = loaded(file, dtype).dense()
    names = {
        "v": "attn_v",
        "k": "attn_k",
        "o": "attn_output",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
    }
    for ours, theirs in names.items():
        expected = torch.from_numpy(file.tensor(f"blk.0.{theirs}.weight"))
        if ours == "k":
            # ggml rotates adjacent rows of a head as a pair.
            expected = expected.view(2, 32, 2, 256).transpose(1, 2).reshape(128, 256)
        assert torch.equal(getattr(weights.layers[0], ours), expected.to(dtype)), ours
    assert torch.equal(weights.embed, torch.from_numpy(file.tensor("token_embd.weight")).to(dtype))
    assert weights.head is weights.embed


def test_bfloat16_has_no_second_copy(file):
    weights = loaded(file, torch.bfloat16)
    assert weights.head is weights.embed
    matrices = [
        weights.embed,
        *(getattr(weights.layers[0], name) for name in ("q", "v", "o", "gate", "up", "down")),
    ]
    assert not any(isinstance(matrix, torch.Tensor) for matrix in matrices)
    assert isinstance(weights.layers[0].k, torch.Tensor), "Q5_0 is dequantised"
    names = ["token_embd", *(f"blk.0.{name}" for name in ("attn_q", "attn_v", "attn_output"))]
    names += [f"blk.0.ffn_{name}" for name in ("gate", "up", "down")]
    stored = sum(file.blocks(f"{name}.weight")[1].nbytes for name in names)
    assert sum(matrix.rows.nbytes for matrix in matrices) < 1.04 * stored
