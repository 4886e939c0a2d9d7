"""Measures one case of the serve benchmark with transformers.

``python peer_transformers.py MODEL.gguf decode|prefill CONTEXT TOKENS THREADS`` prints a JSON object. Run by
``peer`` in its own environment. Must not import Farshore, which is not installed there.
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, GgufConfig

PIECE_TOKENS = 2048


def main() -> None:
    path, case = Path(sys.argv[1]), sys.argv[2]
    context, tokens, threads = map(int, sys.argv[3:6])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    ).eval()
    ids = torch.randint(model.config.vocab_size, (1, context))
    with torch.inference_mode():
        times_s = prefill(model, ids) if case == "prefill" else decode(model, context, tokens)
    print(json.dumps({"times_s": times_s, "attention": model.config._attn_implementation}))


def prefill(model: torch.nn.Module, ids: torch.Tensor) -> list[float]:
    begun_s = time.perf_counter()
    cache = DynamicCache(config=model.config)
    for piece in ids.split(PIECE_TOKENS, dim=1):
        model(piece, past_key_values=cache, logits_to_keep=1)
    return [time.perf_counter() - begun_s]


def decode(model: torch.nn.Module, context: int, tokens: int) -> list[float]:
    """Seconds per token, with a cache of random values, which change no time."""
    config = model.config
    cache = DynamicCache(config=config)
    shape = (1, config.num_key_value_heads, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        k, v = (torch.randn(shape).to(torch.bfloat16) for _ in "kv")
        cache.update(k, v, layer)
    token, times_s = torch.zeros(1, 1, dtype=torch.int64), []
    for _ in range(tokens):
        begun_s = time.perf_counter()
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        times_s.append(time.perf_counter() - begun_s)
    return times_s[4:]


main()
