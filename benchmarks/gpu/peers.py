"""Tokens per second of the engine beside those of others, on the random model of the 8B shape.

Called by ``benchmark``. transformers runs in this process, vLLM, where it is installed, in one of its own: it
keeps the GPU's memory until its process ends. It must not know how an engine works.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from farshore.benchmarks.cases import Measured
from farshore.benchmarks.gpu.engines import Placement
from farshore.benchmarks.gpu.setting import Setting, prompts
from farshore.benchmarks.gpu.steps import kv_bytes, timed_steps
from farshore.benchmarks.report import Result
from farshore.benchmarks.timing import Timing

VLLM_DEADLINE_S = 240.0
_VLLM = """
import json, sys, time
from vllm import LLM, SamplingParams
folder, context, tokens, batch, memory = sys.argv[1], *map(int, sys.argv[2:5]), float(sys.argv[5])
engine = LLM(folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
             max_model_len=context + tokens + 8, gpu_memory_utilization=memory, enable_prefix_caching=False)
prompt = [{"prompt_token_ids": [(7 * i + j) % 1000 for i in range(context)]} for j in range(batch)]
def seconds(count):
    sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    begun = time.perf_counter()
    engine.generate(prompt, sampling, use_tqdm=False)
    return time.perf_counter() - begun
seconds(4)
first = seconds(1)
print(json.dumps({"step_s": (seconds(tokens + 1) - first) / tokens}))
"""
_VLLM_MEMORY = 0.35
"""Of the GPU's memory, which also holds transformers' weights and ours."""


def transformers(setting: Setting) -> Measured:
    """Decode steps with a cache of the same context, by the model that has our weights."""
    return [_beside(setting, "transformers", lambda batch: _transformers_steps(setting, batch))], []


def vllm(setting: Setting) -> Measured:
    """Decode steps of vLLM with random weights of the same shape; nothing where it isn't installed."""
    if find_spec("vllm") is None:
        return [], []
    return [_beside(setting, "vllm", lambda batch: _vllm_steps(setting, batch))], []


def _beside(setting: Setting, name: str, steps: Callable[[int], Timing]) -> Result:
    """Ours and theirs at the largest batch."""
    batch = max(setting.sizes.batches)
    theirs = steps(batch)
    ours = timed_steps(setting, batch, Placement(kv_bytes=kv_bytes(setting, batch)))
    figures = {
        "tokens_per_s": batch / ours.median_s,
        f"{name}_tokens_per_s": batch / theirs.median_s,
        f"times_{name}": theirs.median_s / ours.median_s,
    }
    return Result(f"tokens beside {name}, batch {batch}", ours, figures)


@torch.inference_mode()
def _transformers_steps(setting: Setting, batch: int) -> Timing:
    theirs, ours = setting.large
    asked = prompts(batch, setting.sizes.context_tokens, vocab=ours.config.vocab)
    done: Any = theirs(torch.tensor(asked, device=setting.device), use_cache=True, logits_to_keep=1)
    times_s = []
    for _ in range(setting.sizes.new_tokens):
        begun_s = time.perf_counter()
        token = done.logits[:, -1:].argmax(-1)
        done = theirs(token, past_key_values=done.past_key_values, use_cache=True)
        # The next token is needed on the host, to be sent to the client.
        done.logits[:, -1].argmax(-1).tolist()
        times_s.append(time.perf_counter() - begun_s)
    return Timing(tuple(times_s[len(times_s) // 4 :]))


def _vllm_steps(setting: Setting, batch: int) -> Timing:
    with TemporaryDirectory() as folder:
        described = {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
        (Path(folder) / "config.json").write_text(json.dumps({**setting.sizes.model, **described}))
        sizes = (setting.sizes.context_tokens, setting.sizes.new_tokens, batch, _VLLM_MEMORY)
        done = subprocess.run(
            [sys.executable, "-P", "-c", _VLLM, folder, *map(str, sizes)],
            capture_output=True,
            text=True,
            timeout=VLLM_DEADLINE_S,
        )
    if done.returncode:
        raise RuntimeError(f"vLLM: {(done.stderr.strip().splitlines() or ['ended'])[-1]}")
    return Timing((json.loads(done.stdout.strip().splitlines()[-1])["step_s"],))
