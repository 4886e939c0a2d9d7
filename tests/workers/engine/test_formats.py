"""Stored as int8 or int4, KV is what the store says it is: wherever it lies, and however it came there."""

import pytest
import torch

from farshore.ids import Epoch, SequenceId
from farshore.kernels.formats import KVFormat
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.sequence import Finished, Sampling

SAMPLING = Sampling(max_tokens=180, temperature=0.0)
"""Over a block boundary: some KV is handed over as it is stored."""


def prompt_of(length, seed=0):
    return torch.randint(97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("format", [KVFormat.INT8, KVFormat.INT4])
def test_tokens_do_not_depend_on_where_quantised_kv_lies(tiny_model, rig, submit, format):
    """Local in one segment, over shards in segments with a past, and by head; with guesses; found again."""
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
            it = submit(engine, name, prompt, SAMPLING)
            assert isinstance(it.result(), Finished)
            answers.append(it.tokens)
    assert all(tokens == answers[0] for tokens in answers)
    plain = submit(rig(tiny_model, memory_bytes=64 << 20).start(), "a", prompt, SAMPLING)
    plain.result()
    if format is KVFormat.INT8:
        assert plain.tokens[:20] == answers[0][:20]


@pytest.mark.parametrize("format", [KVFormat.INT8, KVFormat.INT4])
def test_prefill_attends_to_the_values_as_stored(tiny_model, rig, submit, format):
    """A prompt, and the same as a short prompt and tokens forced behind it: the same KV, byte for byte, but
    for what float32 rounds differently in another order."""
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
        stored.append(torch.stack([torch.stack(it) for it in read]))
        store.drop_sequence(reader, epoch=Epoch(1))
    scale = stored[0].abs().amax() / (127 if format is KVFormat.INT8 else 7)
    apart = (stored[0] - stored[1]).abs()
    assert (apart > 1e-4).float().mean() < 0.01 and apart.max() <= 1.01 * scale
