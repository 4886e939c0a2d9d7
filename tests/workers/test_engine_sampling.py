"""Sampling in the engine: the same tokens alone, in a batch and elsewhere; penalties over time."""

import pytest
import torch

from farshore.workers.sequence import Finished, Sampled, Sampling

PROMPT = list(range(5, 45))
WARM = Sampling(max_tokens=24, temperature=1.2, top_p=0.95, min_p=0.01, seed=7, logprobs=2)
MEMORY_BYTES = 64 << 20


def sampled(collected):
    """The Sampled events of a sequence that must finish."""
    events = []
    while not isinstance(event := collected.events.get(timeout=60), Finished):
        assert not hasattr(event, "error"), event
        if isinstance(event, Sampled):
            events.append(event)
    return events


def test_a_seeded_answer_depends_on_nothing_else(tiny_model, rig, submit):
    """Alone, in a batch of others, and on another engine."""
    engine = rig(tiny_model, memory_bytes=MEMORY_BYTES).start()
    (alone,) = [sampled(submit(engine, "alone", PROMPT, WARM))]
    other = Sampling(max_tokens=40, temperature=1.0, seed=8)
    crowd = [submit(engine, f"crowd{i}", PROMPT[i:], other) for i in range(4)]
    batched = submit(engine, "batched", PROMPT, WARM)
    elsewhere = rig(tiny_model, shards=3, shard_by="head", memory_bytes=MEMORY_BYTES).start()
    tokens = [it.token_id for it in alone]
    assert [it.token_id for it in sampled(batched)] == tokens
    assert [it.token_id for it in sampled(submit(elsewhere, "alone", PROMPT, WARM))] == tokens
    assert len({tuple(it.token_id for it in sampled(one)) for one in crowd}) == len(crowd)


def test_log_probabilities_are_those_of_transformers(tiny, tiny_model, rig, submit):
    engine = rig(tiny_model, memory_bytes=MEMORY_BYTES).start()
    events = sampled(submit(engine, "a", PROMPT, WARM))
    ids = torch.tensor([PROMPT + [it.token_id for it in events]])
    with torch.inference_mode():
        logits = tiny(ids).logits[0, len(PROMPT) - 1 : -1].double()
    expected = torch.log_softmax(logits, dim=-1)
    for event, row in zip(events, expected, strict=True):
        assert event.logprob == pytest.approx(float(row[event.token_id]), abs=1e-4)
        best = row.topk(2)
        assert [token for token, _ in event.top] == best.indices.tolist()
        assert [value for _, value in event.top] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("penalty", [1.3, 3.0])
def test_a_repetition_penalty_gives_the_tokens_of_transformers(tiny, tiny_model, rig, submit, penalty):
    engine = rig(tiny_model, memory_bytes=MEMORY_BYTES).start()
    asked = Sampling(max_tokens=30, repetition_penalty=penalty)
    ours = [it.token_id for it in sampled(submit(engine, "a", PROMPT, asked))]
    with torch.inference_mode():
        ids = torch.tensor([PROMPT])
        expected = tiny.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=30,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(PROMPT) :].tolist()
    assert ours == expected


def test_a_frequency_penalty_wears_a_token_out(tiny_model, rig, submit):
    """A bias that makes one token certain, against a penalty that grows with each time it came."""
    engine = rig(tiny_model, memory_bytes=MEMORY_BYTES).start()
    asked = Sampling(max_tokens=40, logit_bias={3: 30.0}, frequency_penalty=2.0)
    tokens = [it.token_id for it in sampled(submit(engine, "a", [3] * 50, asked))]
    times = tokens.count(3)
    assert tokens[:times] == [3] * times and 10 <= times < 20, "the prompt's fifty do not count"
