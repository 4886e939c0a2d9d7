"""Compiles every kernel that an engine and its shards launch, and prints each one's resources, one JSON
object per line. See ``target``; launches compile and write zeros.

Run by ``run`` and by tests/kernels/gpu/test_compile.py. Engines with local and offloaded KV run prompts
through the product's own code, so that the specialisations are those of its tensors: views of heads and
chunks, odd strides, states in float32 beside bfloat16.

    python -P -m farshore.benchmarks.gpu.dry.launches cuda:90 9,3,64:bfloat16 32,8,128:int8
"""

import json
import os
import sys
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from farshore.benchmarks.gpu.dry.target import pretend, resources
from farshore.benchmarks.gpu.engines import Placement, running
from farshore.benchmarks.gpu.models import random_llama, tiny_config
from farshore.kernels.formats import KVFormat
from farshore.kernels.host import HOST
from farshore.kernels.runtime.immediate import ImmediateRuntime
from farshore.kernels.select import CPU_KERNELS
from farshore.sampling import Sampling
from farshore.workers.engine.admission import EngineLimits

MODEL_DTYPES = {KVFormat.FLOAT32: torch.float32, KVFormat.FLOAT16: torch.float16}
"""By the format of KV; bfloat16 for all others."""
PROMPTS = [[(7 * token + i) % 97 for token in range(tokens)] for i, tokens in enumerate((582, 300, 1))]
"""With segments of 256 tokens: prompts with and without past ranges and full chunks. Logits are zeros, so
token 0 is drawn. The first prompt is periodic and goes on with it: guesses make rows for wide tiles."""
LIMITS = EngineLimits(segment_tokens=256, speculate_tokens=8)
SAMPLING = Sampling(max_tokens=12, n=2, prompt_logprobs=1)


def write_zeros() -> None:
    """Makes a launch, which only compiles, write zeros, so that the engine finds no NaN."""
    launch = JITFunction.run

    def run(kernel: Any, *args: Any, **options: Any) -> None:
        launch(kernel, *args, **options)
        for name, argument in zip(kernel.arg_names, args, strict=False):
            if name in ("o", "lse", "normed", "out", "q_out"):
                argument.zero_()

    JITFunction.run = run


def as_on_a_gpu(device: torch.device) -> ImmediateRuntime:
    """Engines and shards take the paths of a GPU."""
    return ImmediateRuntime(device, is_host=False)


def main(name: str, *shapes: str) -> None:
    """``shapes``: query heads, KV heads and head dim of a model, and its KV format."""
    target, compiled = pretend(name)
    write_zeros()
    os.environ[CPU_KERNELS] = "triton"
    printed = set()
    for shape in shapes:
        heads, kv = shape.split(":")
        format = KVFormat(kv)
        q_heads, kv_heads, head_dim = map(int, heads.split(","))
        config = tiny_config(q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim)
        model = random_llama(config, dtype=MODEL_DTYPES.get(format, torch.bfloat16), device=HOST)
        for placement in (
            Placement(format=format),
            Placement(format=format, shards=2),
            Placement(format=format, shards=3, shard_by="head"),
        ):
            with running(model, placement, limits=LIMITS, make_runtime=as_on_a_gpu) as engine:
                engine.answer(PROMPTS, SAMPLING)
            for title, binary in compiled:
                if binary.hash not in printed:
                    printed.add(binary.hash)
                    row = {"target": name, "kernel": title, "shape": shape, "shards": placement.shards}
                    print(json.dumps(row | resources(binary, target)), flush=True)
            compiled.clear()


if __name__ == "__main__":
    main(*sys.argv[1:])
