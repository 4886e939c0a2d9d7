"""From logits to the next token.

Random numbers are keyed by (seed, position), so that a step that is run again, on this engine or another,
draws the same token.
"""

import torch
from torch import Tensor

from farshore.workers.sequence import Sampling

_MIX = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: spreads neighbouring positions over the seed space


def sample(logits: Tensor, sampling: Sampling, *, position: int) -> int:
    """logits ``f32[vocab]`` -> token id for ``position``."""
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    scaled = logits.double() / sampling.temperature
    probabilities = torch.softmax(scaled, dim=-1)
    if sampling.top_p < 1.0:
        probabilities = _nucleus(probabilities, sampling.top_p)
    generator = torch.Generator().manual_seed((sampling.seed * _MIX + position) % 2**63)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keeps the smallest set of most likely tokens that holds ``top_p``, never none."""
    ordered, order = probabilities.sort(descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = torch.where(before < top_p, ordered, 0.0)
    return torch.zeros_like(probabilities).scatter_(0, order, kept)
