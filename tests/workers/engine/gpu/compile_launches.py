"""Compiles every kernel that an engine and its shards launch, without a GPU, and prints each one's resources,
one JSON object per line.

tests/kernels/test_gpu_compile.py runs it in a process of its own, like compile_gpu.py there, whose driver it
uses: launches compile and write zeros. Engines with local and offloaded KV run prompts through the product's
own code, so that the specialisations are those of its tensors: views of heads and chunks, odd strides, states
in float32 beside bfloat16.

    python -P tests/workers/engine/gpu/compile_launches.py cuda:90 9,3,64:bfloat16 32,8,128:int8
"""

import importlib.util
import json
import os
import queue
import sys
from pathlib import Path

import torch
from triton.runtime.jit import JITFunction

from farshore.attention_offload.client.in_process import InProcessClient
from farshore.ids import FIRST_EPOCH, SequenceId, WorkerId
from farshore.kernels.formats import KVFormat
from farshore.kernels.select import CPU_KERNELS
from farshore.kvstore.store.arena import Arena
from farshore.kvstore.store.store import LocalStore
from farshore.models.config.model import ModelConfig
from farshore.models.config.rope import RopeConfig
from farshore.models.llama import LayerWeights, Llama, LlamaWeights
from farshore.sampling import Sampling
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.attention_model import attention_model
from farshore.workers.engine.engine import Engine
from farshore.workers.engine.sequence import Failed, Finished

ENGINE = WorkerId("engine")
MODEL_DTYPES = {KVFormat.FLOAT32: torch.float32, KVFormat.FLOAT16: torch.float16}
"""By the format of KV; bfloat16 for all others."""
PROMPTS = (600, 300, 1)
"""With segments of 256 tokens: prompts with and without past ranges and full chunks."""
PLACEMENTS = ((0, "range"), (2, "range"), (3, "head"))
"""(shards, how they share); without shards KV is local."""


def kernels_test_module():
    path = Path(__file__).parents[3] / "kernels" / "compile_gpu.py"
    spec = importlib.util.spec_from_file_location("compile_gpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_zeros():
    """Makes a launch, which only compiles, write zeros, so that the engine finds no NaN."""
    launch = JITFunction.run

    def run(kernel, *args, **options):
        launch(kernel, *args, **options)
        for name, argument in zip(kernel.arg_names, args, strict=False):
            if name in ("o", "lse"):
                argument.zero_()

    JITFunction.run = run


def random_model(q_heads, kv_heads, head_dim, *, dtype):
    hidden, inner, vocab = 64, 96, 97
    made = torch.Generator().manual_seed(1)

    def weights(*shape):
        return (torch.randn(*shape, generator=made) * shape[-1] ** -0.5).to(dtype)

    layer = LayerWeights(
        attention_norm=weights(hidden),
        q=weights(q_heads * head_dim, hidden),
        k=weights(kv_heads * head_dim, hidden),
        v=weights(kv_heads * head_dim, hidden),
        o=weights(hidden, q_heads * head_dim),
        mlp_norm=weights(hidden),
        gate=weights(inner, hidden),
        up=weights(inner, hidden),
        down=weights(hidden, inner),
    )
    config = ModelConfig(
        name="random",
        layers=2,
        hidden=hidden,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=inner,
        vocab=vocab,
        max_positions=1024,
        rms_eps=1e-5,
        rope=RopeConfig(theta=10000.0),
    )
    embed = weights(vocab, hidden)
    return Llama(config, LlamaWeights(embed, (layer, layer), weights(hidden), embed))


def serve(model, format, shards, shard_by):
    """Runs an engine with as many shards, all in this process, until every prompt is answered."""
    attention = attention_model(model.config, model.dtype, format)
    workers = [ENGINE, *(WorkerId(f"shard{i}") for i in range(shards))]
    arenas = {worker: Arena(64 << 20) for worker in workers}
    stores = {worker: LocalStore(worker=worker, arena=arenas[worker]) for worker in workers}
    engine = Engine(
        model=model,
        attention=attention,
        arena=arenas[ENGINE],
        clients={worker: InProcessClient(worker, store, attention) for worker, store in stores.items()},
        targets=workers[1:] or workers,
        shard_by=shard_by,
        limits=EngineLimits(segment_tokens=256, speculate_tokens=8),
    )
    engine.start()
    events = queue.SimpleQueue()
    sampling = Sampling(max_tokens=12, n=2, prompt_logprobs=1)
    for i, tokens in enumerate(PROMPTS):
        prompt = [(7 * t + i) % 97 for t in range(tokens)]
        engine.submit(SequenceId(str(i)), prompt, sampling, events.put, epoch=FIRST_EPOCH)
    ends = 0
    while ends < sampling.n * len(PROMPTS):
        event = events.get(timeout=300)
        assert not isinstance(event, Failed), event
        ends += isinstance(event, Finished)
    engine.stop()


def main(target, *shapes):
    """``shapes``: query heads, KV heads and head dim of a model, and its KV format."""
    compile_gpu = kernels_test_module()
    target, compiled = compile_gpu.pretend(target)
    write_zeros()
    os.environ[CPU_KERNELS] = "triton"
    printed = set()
    for shape in shapes:
        heads, name = shape.split(":")
        format = KVFormat(name)
        model = random_model(*map(int, heads.split(",")), dtype=MODEL_DTYPES.get(format, torch.bfloat16))
        for shards, shard_by in PLACEMENTS:
            serve(model, format, shards, shard_by)
            for title, binary in compiled:
                if binary.hash not in printed:
                    printed.add(binary.hash)
                    row = {"kernel": title, "shape": shape, "shards": shards}
                    print(json.dumps(row | compile_gpu.resources(binary, target)), flush=True)
            compiled.clear()


if __name__ == "__main__":
    main(*sys.argv[1:])
