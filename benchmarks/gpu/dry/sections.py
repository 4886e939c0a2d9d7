"""Runs every section of the GPU benchmark on a CPU, with tiny sizes and triton's kernels interpreted.

It proves that the sections' code runs, and the kernels' results; its times mean nothing. Prints one JSON
object per section: its name, its error or null, and its bars. Run by ``run``, in a process of its own.

    TRITON_INTERPRET=1 python -P -m farshore.benchmarks.gpu.dry.sections
"""

import json

import torch

from farshore.benchmarks.gpu.sections import SECTIONS, measured
from farshore.benchmarks.gpu.setting import Setting, Sizes
from farshore.kernels.host import HOST

MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
TINY = Sizes(
    copy_bytes=1 << 16,
    gemm=16,
    decode_tokens=16,
    decode_layers=1,
    extend_tokens=8,
    dense_rows=3,
    rounds=1,
    model=MODEL,
    batches=(1, 2),
    context_tokens=9,
    new_tokens=12,
    answers=2,
    prompt_tokens=5,
    answer_tokens=4,
    every_case=100,
    check_processes=2,
    shard_bytes=32 << 20,
    shard_threads=1,
)


def main() -> None:
    torch.set_num_threads(1)
    setting = Setting(HOST, TINY, folder=None, progress=lambda _: None)
    for name in SECTIONS:
        results, bars = measured(name, setting)
        error = next((bar.note for bar in bars if bar.value is None), None)
        row = {
            "section": name,
            "error": error,
            "results": [result.name for result in results],
            "bars": {bar.name: bar.value for bar in bars if bar.value is not None},
            "bounds": {bar.name: bar.bound for bar in bars},
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
