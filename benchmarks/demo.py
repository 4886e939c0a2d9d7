"""The demo model as benchmarks run it. Used by ``offload`` and ``serve``, through ``catalogue``."""

from dataclasses import replace

import torch

from farshore.models.config import load_config
from farshore.models.llama import Llama
from farshore.models.source import DEMO, resolve
from farshore.models.weights import load_model

POSITIONS = 40_960
"""SmolLM2 has 8,192; contexts that are measured reach 32K, with a tail behind. No time depends on it."""


def load_demo(threads: int) -> Llama:
    """SmolLM2 in bfloat16, served by ``threads`` threads, with room for every context that is measured."""
    source = resolve(DEMO)
    config = replace(load_config(source), max_positions=POSITIONS)
    return load_model(source, dtype=torch.bfloat16, config=config, threads=threads)
