"""Loads the demo model for the benchmarks ``offload`` and ``serve``."""

from dataclasses import replace

import torch

from farshore.models.config.load import load_config
from farshore.models.files.source import DEMO, resolve
from farshore.models.llama import Llama
from farshore.models.weights.load import load_model

POSITIONS = 40_960
"""SmolLM2 has 8,192; measured contexts reach 32K tokens and a tail. Times do not depend on this number."""


def load_demo(threads: int) -> Llama:
    """SmolLM2 in bfloat16 on ``threads`` threads, with positions for every measured context."""
    source = resolve(DEMO)
    config = replace(load_config(source), max_positions=POSITIONS)
    return load_model(source, dtype=torch.bfloat16, config=config, threads=threads)
