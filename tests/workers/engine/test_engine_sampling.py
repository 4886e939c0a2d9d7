"""Sampling in an engine: seeded tokens do not depend on the batch, and penalties count over time."""

import math
from dataclasses import replace

import pytest
import torch

from farshore.models.llama import Llama
from farshore.sampling import Sampling
from farshore.workers.engine.sequence import Failed, Finished, Reason, Sampled

PROMPT = list(range(5, 45))
WARM = Sampling(max_tokens=24, temperature=1.2, top_p=0.95, min_p=0.01, seed=7, logprobs=2)
MEMORY_BYTES = 64 << 20


def ended(collected, n=1):
    """Waits for n completions; returns their Sampled events and choice -> Finished. Fails on Failed."""
    events, ends = [], {}
    while len(ends) < n:
        event = collected.events.get(timeout=60)
        assert not isinstance(event, Failed), event.error
        if isinstance(event, Sampled):
            events.append(event)
        elif isinstance(event, Finished):
            ends[event.choice] = event
    return events, ends


def sampled(collected):
    """Waits for one completion; returns its Sampled events."""
    return ended(collected)[0]


def tokens_of(events, choice=0):
    return [event.token_id for event in events if event.choice == choice]


def test_a_seeded_answer_is_the_same_alone_in_a_batch_and_elsewhere(tiny_model, rig, submit):
    """The tokens are the same alone, in a batch, and on another engine."""
    engine = rig(tiny_model, memory_bytes=MEMORY_BYTES).start()
    (alone,) = [sampled(submit(engine, "alone", PROMPT, WARM))]
    other = Sampling(max_tokens=40, temperature=1.0, seed=8)
    crowd = [submit(engine, f"crowd{i}", PROMPT[i:], other) for i in range(4)]
    batched = submit(engine, "batched", PROMPT, WARM)
    elsewhere = rig(tiny_model, shards=3, shard_by="head", memory_bytes=MEMORY_BYTES).start()
    tokens = [event.token_id for event in alone]
    assert [event.token_id for event in sampled(batched)] == tokens
    assert [event.token_id for event in sampled(submit(elsewhere, "alone", PROMPT, WARM))] == tokens
    assert len({tuple(event.token_id for event in sampled(other_answer)) for other_answer in crowd}) == len(
        crowd
    )


def test_log_probabilities_are_those_of_transformers(tiny, tiny_model, rig, submit):
    engine = rig(tiny_model, memory_bytes=MEMORY_BYTES).start()
    events = sampled(submit(engine, "a", PROMPT, WARM))
    ids = torch.tensor([PROMPT + [event.token_id for event in events]])
    with torch.inference_mode():
        logits = tiny(ids).logits[0, len(PROMPT) - 1 : -1].double()
    expected = torch.log_softmax(logits, dim=-1)
    for event, row in zip(events, expected, strict=True):
        assert event.logprob == pytest.approx(float(row[event.token_id]), abs=1e-4)
        best = row.topk(2)
        assert [token for token, _ in event.top] == best.indices.tolist()
        assert [value for _, value in event.top] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("penalty", [1.3, 3.0, 0.01, 1e-39])
def test_a_repetition_penalty_gives_the_tokens_of_transformers(tiny, tiny_model, rig, submit, penalty):
    engine = rig(tiny_model, memory_bytes=MEMORY_BYTES).start()
    asked = Sampling(max_tokens=30, repetition_penalty=penalty)
    ours = [event.token_id for event in sampled(submit(engine, "a", PROMPT, asked))]
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


@pytest.mark.parametrize(
    "extreme",
    [
        {"repetition_penalty": 1e-39, "temperature": 1.0},
        {"repetition_penalty": 1e-300, "frequency_penalty": 1e300, "presence_penalty": -1e300},
        {"logit_bias": {3: 1e39, 4: -1e39}, "repetition_penalty": 1e-300, "temperature": 1e-300},
        {"temperature": 1e-40, "top_p": 0.5, "min_p": 0.1, "frequency_penalty": -1e39},
    ],
    ids=str,
)
def test_parameters_that_overflow_are_no_damage_of_the_model(tiny_model, rig, submit, extreme):
    engine = rig(tiny_model, memory_bytes=MEMORY_BYTES).start()
    answer = sampled(submit(engine, "a", PROMPT, Sampling(max_tokens=10, logprobs=2, seed=1, **extreme)))
    assert len(answer) == 10 and all(math.isfinite(event.logprob) for event in answer)


@pytest.mark.parametrize("damage", [math.nan, math.inf])
@pytest.mark.parametrize("knobs", [{}, {"repetition_penalty": 1e-39, "temperature": 1.0}], ids=str)
def test_damaged_weights_are_told_whatever_the_parameters(tiny_model, rig, submit, damage, knobs):
    norm = torch.full_like(tiny_model.weights.norm, damage)
    model = Llama(tiny_model.config, tiny_model.weights._replace(norm=norm))
    engine = rig(model, memory_bytes=MEMORY_BYTES).start()
    result = submit(engine, "a", PROMPT, Sampling(max_tokens=10, **knobs)).result()
    assert isinstance(result, Failed) and "its weights or the stored KV are damaged" in str(result.error)


def test_a_frequency_penalty_ends_the_repetition_of_a_token(tiny_model, rig, submit):
    """A bias makes one token certain until the penalty, which grows with its count, outweighs it."""
    engine = rig(tiny_model, memory_bytes=MEMORY_BYTES).start()
    asked = Sampling(max_tokens=40, logit_bias={3: 30.0}, frequency_penalty=2.0)
    tokens = [event.token_id for event in sampled(submit(engine, "a", [3] * 50, asked))]
    times = tokens.count(3)
    assert tokens[:times] == [3] * times and 10 <= times < 20, "the prompt's fifty tokens do not count"


def test_choices_of_a_request_are_independent(tiny_model, rig, submit):
    """The first choice equals the answer of a request with one completion."""
    engine = rig(tiny_model, memory_bytes=MEMORY_BYTES).start()
    events, ends = ended(submit(engine, "a", PROMPT, replace(WARM, n=3)), 3)
    answers = [tokens_of(events, choice) for choice in range(3)]
    assert answers[0] == tokens_of(sampled(submit(engine, "one", PROMPT, WARM)))
    assert len({tuple(answer) for answer in answers}) == 3
    again, _ = ended(submit(engine, "again", PROMPT, replace(WARM, n=3)), 3)
    assert [tokens_of(again, choice) for choice in range(3)] == answers
    assert {choice: end.reason for choice, end in ends.items()} == dict.fromkeys(range(3), Reason.LENGTH)


def test_a_choice_is_cancelled_and_the_others_continue(tiny_model, rig, submit):
    engine = rig(tiny_model, memory_bytes=MEMORY_BYTES).start()
    collected = submit(engine, "a", PROMPT, Sampling(max_tokens=400, temperature=1.0, n=3), pause_at=[3])
    with collected.paused:
        engine.cancel("a", choice=1)
    events, ends = ended(collected, 3)
    assert {choice: end.reason for choice, end in ends.items()} == {
        0: Reason.LENGTH,
        1: Reason.CANCELLED,
        2: Reason.LENGTH,
    }
    assert len(tokens_of(events, 1)) <= 2
    assert len(tokens_of(events, 0)) == len(tokens_of(events, 2)) == 400
