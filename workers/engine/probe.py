"""A built-in request of one token: whether the engine can still compute.

Called by ``engine`` after an error that is no sequence's own. It takes no memory of any store.
"""

import torch

from farshore.attention_offload.base import AttentionModel
from farshore.errors import Internal
from farshore.ids import Epoch, SequenceId
from farshore.models.llama import Llama
from farshore.workers.pool import Pool
from farshore.workers.prefill import Segment
from farshore.workers.sequence import Sampling, Sequence
from farshore.workers.shard_queue import Holder


def probe(model: Llama, attention: AttentionModel, pool: Pool) -> None:
    """Prefills a prompt of one token, of which nothing is stored. Raises what that raises, or Internal for
    logits that are not numbers."""
    sequence = Sequence(
        id=SequenceId("probe"),
        epoch=Epoch(0),
        order=0,
        prompt_tokens=1,
        tokens=[0],
        sampling=Sampling(max_tokens=1),
        emit=lambda event: None,
        arrived_s=0.0,
        fingerprint=b"",
        holder=Holder(SequenceId("probe"), Epoch(0)),
    )
    segment = Segment(sequence, 0, 1, model=model, attention=attention, pool=pool, logits_of=1)
    for unit in segment.units():
        assert callable(unit), "a segment without spans waits for no shard"
        unit()
    if segment.logits is None or not bool(torch.isfinite(segment.logits).all()):
        raise Internal("the model's logits are not numbers")
