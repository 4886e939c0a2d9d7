"""Loading takes the memory of the loaded weights and little more, whatever the types of file and model."""

import json
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch

from farshore.benchmarks.load.benchmark import MOST_MEMORY
from farshore.benchmarks.load.checkpoint import Shape, write

pytest.importorskip("farshore.kernels.cpu.attention", reason="the native kernels are not built here")

SHAPE = Shape(layers=2, hidden=1024, intermediate=4096, heads=16, kv_heads=4, vocab=25_000, files=2)
WEIGHTS = SHAPE.layers * (2.5 * SHAPE.hidden + 3 * SHAPE.intermediate) * SHAPE.hidden
WEIGHTS += 2 * SHAPE.vocab * SHAPE.hidden


def growth_bytes(model, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = [sys.executable, "-P", "-m", "farshore.benchmarks.load.child", str(model), dtype, "2"]
    child = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    return child["peak_bytes"] - child["before_bytes"]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("stored", "dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_safetensors(tmp_path, monkeypatch, stored, dtype):
    write(tmp_path, SHAPE, stored)
    growth = growth_bytes(tmp_path, str(dtype).removeprefix("torch."), tmp_path, monkeypatch)
    assert growth <= MOST_MEMORY * WEIGHTS * dtype.itemsize


@pytest.mark.heavy
def test_gguf(tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(SHAPE.layers)
    writer.add_context_length(64)
    writer.add_embedding_length(SHAPE.hidden)
    writer.add_feed_forward_length(SHAPE.intermediate)
    writer.add_head_count(SHAPE.heads)
    writer.add_head_count_kv(SHAPE.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(SHAPE.vocab)
    hidden, kv = SHAPE.hidden, SHAPE.hidden // SHAPE.heads * SHAPE.kv_heads
    layer = {"attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_q": (hidden, hidden)}
    layer |= {"attn_output": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden)}
    layer |= dict.fromkeys(("ffn_gate", "ffn_up"), (SHAPE.intermediate, hidden))
    layer |= {"ffn_down": (hidden, SHAPE.intermediate)}
    shapes = {"token_embd": (SHAPE.vocab, hidden), "output": (SHAPE.vocab, hidden), "output_norm": (hidden,)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(SHAPE.layers) for name, shape in layer.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float16 if len(shape) > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert growth_bytes(path, "bfloat16", tmp_path, monkeypatch) <= MOST_MEMORY * WEIGHTS * 2
