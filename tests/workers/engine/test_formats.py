"""Engines with int8 or int4 KV: tokens do not depend on where KV is stored or on how it got there."""

import pytest
import torch

from farshore.ids import Epoch, SequenceId
from farshore.kernels.formats import KVFormat
from farshore.sampling import Sampling
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.sequence import Finished

SAMPLING = Sampling(max_tokens=180, temperature=0.0)
"""The answer crosses a block boundary, so quantised KV is handed off."""


def prompt_of(length, seed=0):
    return torch.randint(97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("format", [KVFormat.INT8, KVFormat.INT4])
def test_tokens_do_not_depend_on_where_quantised_kv_lies(tiny_model, rig, submit, format):
    """Local in one segment; on shards in several segments; by head with guesses; and from a stored prefix."""
    prompt = prompt_of(600)
    answers = []
    for options, limits in (
        ({"shards": 0, "local": True}, EngineLimits()),
        ({"shards": 2}, EngineLimits(segment_tokens=256)),
        ({"shards": 3, "shard_by": "head"}, EngineLimits(segment_tokens=256, speculate_tokens=4)),
    ):
        cluster = rig(tiny_model, memory_bytes=64 << 20, format=format, **options)
        engine = cluster.start(limits=limits)
        for name in "ab":
            collected = submit(engine, name, prompt, SAMPLING)
            assert isinstance(collected.result(), Finished)
            answers.append(collected.tokens)
    assert all(tokens == answers[0] for tokens in answers)
    plain = submit(rig(tiny_model, memory_bytes=64 << 20).start(), "a", prompt, SAMPLING)
    plain.result()
    if format is KVFormat.INT8:
        assert plain.tokens[:20] == answers[0][:20]


@pytest.mark.parametrize("format", [KVFormat.INT8, KVFormat.INT4])
def test_prefill_attends_to_the_values_as_stored(tiny_model, rig, submit, format):
    """Prefill in segments of 256 and of 2048 tokens stores the same KV, up to float32 rounding."""
    stored = []
    for segment_tokens in (256, 2048):
        cluster = rig(tiny_model, shards=1, memory_bytes=64 << 20, format=format)
        engine = cluster.start(limits=EngineLimits(segment_tokens=segment_tokens))
        assert isinstance(submit(engine, "a", prompt_of(600), Sampling(max_tokens=1)).result(), Finished)
        (store,) = [cluster.stores[worker] for worker in cluster.targets]
        (info,) = store.announce()
        reader = SequenceId("reader")
        store.hold([info.span], sequence=reader, epoch=Epoch(1))
        layers = range(tiny_model.config.layers)
        read = [store.read(info.span, layer, 0, 600, sequence=reader) for layer in layers]
        stored.append(torch.stack([torch.stack(k_and_v) for k_and_v in read]))
        store.drop_sequence(reader, epoch=Epoch(1))
    scale = stored[0].abs().amax() / (127 if format is KVFormat.INT8 else 7)
    difference = (stored[0] - stored[1]).abs()
    assert (difference > 1e-4).float().mean() < 0.01 and difference.max() <= 1.01 * scale
