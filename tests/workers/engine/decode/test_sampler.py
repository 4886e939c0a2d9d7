"""The sampler against the processors of transformers, parameter by parameter, and its draws against the
distribution.
"""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from farshore.errors import FarshoreError
from farshore.sampling import Sampling
from farshore.workers.engine.decode import sampler
from farshore.workers.engine.decode.sampler import candidates, uniform
from farshore.workers.engine.penalties import LARGEST, TokenCounts, finite

from .strategies import accepted, anything, rows_of_logits

VOCAB = 1000
TOKENS = [5, 17, 17, 400, 999, 3, 3, 3]
PROMPT_TOKENS = 4


def row(seed, *, vocab=VOCAB, spread=3.0):
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread


def asked(**knobs):
    return Sampling(max_tokens=1, **knobs)


def sample(logits, sampling, **context):
    return sampler.sample(logits, sampling, counts=TokenCounts(), **context)


def adjusted(row, sampling, **context):
    return sampler.adjusted(row, sampling, counts=TokenCounts(), **context)


def draw(logits, sampling, position=0, choice=0):
    return sample(logits, sampling, tokens=range(position), prompt_tokens=position, choice=choice).token


def probabilities(logits, sampling):
    ids, weights = candidates(logits.numpy(), sampling)
    assert (np.diff(ids) > 0).all()
    out = np.zeros(len(logits))
    out[ids] = weights / weights.sum()
    return out


def close_to(chi_square, freedom):
    """Whether ``chi_square`` is within 4.5 standard deviations of its mean. Seeds are fixed."""
    return abs(chi_square - freedom) < 4.5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("knobs", "warpers"),
    [
        ({"temperature": 0.7}, [hf.TemperatureLogitsWarper(0.7)]),
        ({"top_k": 1}, [hf.TopKLogitsWarper(1)]),
        ({"top_k": 40}, [hf.TopKLogitsWarper(40)]),
        ({"top_k": VOCAB + 1}, []),
        ({"top_p": 0.01}, [hf.TopPLogitsWarper(0.01)]),
        ({"top_p": 0.6}, [hf.TopPLogitsWarper(0.6)]),
        ({"top_p": 0.999}, [hf.TopPLogitsWarper(0.999)]),
        ({"min_p": 0.02}, [hf.MinPLogitsWarper(0.02)]),
        ({"min_p": 1.0}, [hf.MinPLogitsWarper(1.0)]),
        (
            {"temperature": 1.6, "top_k": 300, "top_p": 0.8, "min_p": 0.01},
            [
                hf.TemperatureLogitsWarper(1.6),
                hf.TopKLogitsWarper(300),
                hf.TopPLogitsWarper(0.8),
                hf.MinPLogitsWarper(0.01),
            ],
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_the_distribution_equals_transformers(knobs, warpers, seed):
    logits = row(seed)
    scores = logits[None].clone()
    for warper in warpers:
        scores = warper(torch.tensor([TOKENS]), scores)
    expected = torch.softmax(scores.double(), dim=-1)[0].numpy()
    ours = probabilities(logits, asked(**{"temperature": 1.0, **knobs}))
    assert ((ours > 0) == (expected > 0)).all()
    assert np.allclose(ours, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("knobs", "processors"),
    [
        ({"repetition_penalty": 1.3}, [hf.RepetitionPenaltyLogitsProcessor(1.3)]),
        ({"repetition_penalty": 0.8}, [hf.RepetitionPenaltyLogitsProcessor(0.8)]),
        (
            {"logit_bias": {17: 2.5, 8: -100.0}},
            [hf.SequenceBiasLogitsProcessor([[[17], 2.5], [[8], -100.0]])],
        ),
        (
            {"logit_bias": {17: 2.5, 8: -100.0}, "repetition_penalty": 1.3},
            [
                hf.SequenceBiasLogitsProcessor([[[17], 2.5], [[8], -100.0]]),
                hf.RepetitionPenaltyLogitsProcessor(1.3),
            ],
        ),
    ],
)
def test_bias_and_repetition_penalty_equal_transformers(knobs, processors):
    logits = row(11)
    before = logits.clone()
    scores = logits[None].clone()
    for processor in processors:
        scores = processor(torch.tensor([TOKENS]), scores)
    ours = adjusted(logits.numpy(), asked(**knobs), tokens=TOKENS, prompt_tokens=PROMPT_TOKENS)
    assert torch.equal(torch.from_numpy(ours), scores[0])
    assert torch.equal(logits, before), "the caller's logits must not change"


def test_presence_and_frequency_count_the_completion_only():
    """OpenAI's formula: logit - count * frequency - (count > 0) * presence."""
    logits = row(12)
    ours = adjusted(
        logits.numpy(),
        asked(presence_penalty=0.5, frequency_penalty=0.25),
        tokens=TOKENS,
        prompt_tokens=PROMPT_TOKENS,
    )
    expected = logits.clone()
    for token, count in Counter(TOKENS[PROMPT_TOKENS:]).items():
        expected[token] -= 0.5 + 0.25 * count
    assert np.allclose(ours, expected.numpy(), atol=1e-6)
    assert ours[17] == logits[17], "a token that is in the prompt only has no penalty"


def test_a_row_without_bias_and_penalties_is_not_copied():
    logits = row(13).numpy()
    assert adjusted(logits, asked(presence_penalty=0.0), tokens=TOKENS, prompt_tokens=4) is logits


def test_penalties_and_bias_reach_greedy_and_come_before_temperature():
    logits = torch.zeros(8)
    logits[2], logits[3], logits[4] = 3.0, 2.0, 1.5
    for knobs, expected in (
        ({}, 2),
        ({"repetition_penalty": 2.2}, 4),
        ({"frequency_penalty": 0.8}, 4),
        ({"logit_bias": {7: 50.0}}, 7),
    ):
        for temperature in (0.0, 1e-3):
            sampling = asked(temperature=temperature, **knobs)
            assert sample(logits, sampling, tokens=[2, 2, 3], prompt_tokens=0).token == expected, knobs


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=60),
    st.floats(0.01, 1.0),
    st.integers(0, 70),
    st.floats(0.0, 1.0),
)
@settings(max_examples=60, deadline=None)
def test_candidates_are_the_smallest_sets(grains, top_p, top_k, min_p):
    """Compares with plain Python. Logits are multiples of 1/4, coarse as bfloat16, so there are ties."""
    logits = torch.tensor(grains, dtype=torch.float32) / 4
    weights = [math.exp(x - max(logits.tolist())) for x in logits.tolist()]
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    if 0 < top_k < len(order):
        order = [i for i in order if weights[i] >= weights[order[top_k - 1]]]
    total, running, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        # So near to the limit, rounding decides on which side a token falls.
        if abs(running - top_p * total) < 1e-6 * total and kept:
            return
        if running < top_p * total:
            kept.append(i)
        running += weights[i]
    if any(abs(weights[i] - min_p) < 1e-6 for i in kept):
        return
    expected = sorted(i for i in kept if weights[i] >= min_p) or [order[0]]
    ids, _ = candidates(logits.numpy(), asked(temperature=1.0, top_p=top_p, top_k=top_k, min_p=min_p))
    assert ids.tolist() == expected


@pytest.mark.parametrize("along", ["positions", "choices", "seeds"])
@pytest.mark.parametrize("knobs", [{}, {"temperature": 0.5}, {"top_k": 6}, {"top_p": 0.7}], ids=str)
def test_draws_follow_the_distribution(knobs, along):
    logits = row(1, vocab=24, spread=1.0)
    sampling = asked(**{"temperature": 1.0, "seed": 99, **knobs})
    expected = probabilities(logits, sampling)
    draws = 5_000
    drawn = {
        "positions": (draw(logits, sampling, position=i) for i in range(draws)),
        "choices": (draw(logits, sampling, choice=i) for i in range(draws)),
        "seeds": (draw(logits, dataclasses.replace(sampling, seed=i)) for i in range(draws)),
    }[along]
    counts = np.bincount(list(drawn), minlength=len(logits))
    possible = expected > 0
    assert not counts[~possible].any()
    chi_square = ((counts - draws * expected)[possible] ** 2 / (draws * expected[possible])).sum()
    assert close_to(chi_square, possible.sum() - 1)


def test_a_draw_inverts_the_running_sum_of_a_whole_vocabulary():
    """Partial sums of blocks give the same token as one running sum."""
    logits = row(2, vocab=49_152)
    sampling = asked(temperature=1.0, seed=5)
    ids, weights = candidates(logits.numpy(), sampling)
    sums = np.cumsum(weights, dtype=np.float64)
    for position in range(200):
        target = uniform(5, 0, position) * sums[-1]
        token = draw(logits, sampling, position=position)
        before = sums[token - 1] if token else 0.0
        assert before - 1e-6 * sums[-1] <= target <= sums[token] + 1e-6 * sums[-1]
        assert weights[token] > 0
    assert len(ids) == 49_152


def test_random_numbers_are_uniform_and_neighbours_independent():
    """Keys are successive seeds, choices and positions, as in use."""
    numbers = np.array(
        [
            [[uniform(s, c, p) for p in range(30)] for c in range(30)]
            for s in (*range(15), *(2**64 - 1 - i for i in range(15)))
        ]
    )
    assert (numbers >= 0).all() and (numbers < 1).all()
    assert len(np.unique(numbers)) == numbers.size
    cells = np.bincount((numbers.ravel() * 64).astype(int), minlength=64)
    assert close_to(((cells - numbers.size / 64) ** 2 / (numbers.size / 64)).sum(), 63)
    for axis in range(3):
        along = np.moveaxis(numbers, axis, 0)
        first, second = along[:-1].ravel(), along[1:].ravel()
        pairs = np.histogram2d(first, second, bins=8, range=[[0, 1], [0, 1]])[0]
        assert close_to(((pairs - first.size / 64) ** 2 / (first.size / 64)).sum(), 63), axis


def test_log_probabilities_are_the_models_own():
    """They precede bias, penalties and temperature; among equal tokens the smaller id is first."""
    logits = row(4)
    logits[[700, 800]] = logits.max() + 1
    expected = torch.log_softmax(logits.double(), dim=-1)
    knobs = {"temperature": 2.0, "top_k": 5, "logit_bias": {3: 9.0}, "repetition_penalty": 1.5, "seed": 1}
    drawn = sample(logits, asked(logprobs=4, **knobs), tokens=TOKENS, prompt_tokens=2)
    assert drawn.token == sample(logits, asked(**knobs), tokens=TOKENS, prompt_tokens=2).token
    assert drawn.logprob == pytest.approx(float(expected[drawn.token]), abs=1e-5)
    best = sorted(range(VOCAB), key=lambda i: (-float(logits[i]), i))[:4]
    assert [token for token, _ in drawn.top] == best and best[:2] == [700, 800]
    assert [value for _, value in drawn.top] == pytest.approx([float(expected[i]) for i in best], abs=1e-5)
    assert sample(logits, asked(logprobs=0), tokens=TOKENS, prompt_tokens=2).top == ()
    assert sample(logits, asked(), tokens=TOKENS, prompt_tokens=2).logprob is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("damage", [[math.nan], [math.inf], [-math.inf], [math.nan, math.inf]])
@pytest.mark.parametrize("knobs", [{}, {"repetition_penalty": 2.0}, {"logit_bias": {10: 1.0}}], ids=str)
def test_logits_that_are_not_finite_are_refused(temperature, damage, knobs):
    logits = row(6)
    logits[10 : 10 + len(damage)] = torch.tensor(damage)
    with pytest.raises(FarshoreError, match="not numbers"):
        sample(logits, asked(temperature=temperature, **knobs), tokens=[10], prompt_tokens=1)


def test_alternatives_are_bounded_by_the_vocabulary():
    logits = torch.tensor([1.0, 3.0, 2.0])
    for count, expected in ((1, [1]), (3, [1, 2, 0]), (4, [1, 2, 0]), (1 << 40, [1, 2, 0]), (-1, [])):
        drawn = sample(logits, asked(logprobs=count), tokens=[0], prompt_tokens=1)
        assert [token for token, _ in drawn.top] == expected
        assert drawn.logprob == pytest.approx(float(torch.log_softmax(logits, 0)[1]))


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({"repetition_penalty": 1e-38}, [LARGEST, -2e-38, 0.0, 3.0]),
        ({"repetition_penalty": 1e-300}, [LARGEST, 0.0, 0.0, 3.0]),
        ({"repetition_penalty": 0.0}, [LARGEST, 0.0, 0.0, 3.0]),
        ({"repetition_penalty": 1e300}, [4.0 / LARGEST, -LARGEST, 0.0, 3.0]),
        ({"presence_penalty": 1e300}, [4.0, -LARGEST, -LARGEST, 3.0]),
        ({"presence_penalty": -1e300}, [4.0, LARGEST, LARGEST, 3.0]),
        ({"presence_penalty": 1e300, "frequency_penalty": -1e300}, [4.0, -2.0, LARGEST, 3.0]),
        ({"logit_bias": {0: 1e300, 1: -1e300, 4: 1.0, -1: 9.0, 1 << 80: 9.0}}, [LARGEST, -LARGEST, 0.0, 3.0]),
    ],
    ids=str,
)
def test_logits_outside_float32_are_clipped_to_its_limits(knobs, expected):
    logits = np.array([4.0, -2.0, 0.0, 3.0], dtype=np.float32)
    ours = adjusted(logits, asked(**knobs), tokens=[0, 1, 2, 2], prompt_tokens=1)
    assert np.allclose(ours, np.array(expected, dtype=np.float32), rtol=1e-6, atol=0.0)
    drawn = sample(torch.from_numpy(logits), asked(**knobs), tokens=[0, 1, 2, 2], prompt_tokens=1)
    assert drawn.token == int(np.argmax(expected)), "among equal logits the smallest id is drawn"


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 700])
def test_a_nucleus_of_equal_logits_has_exactly_as_many_as_top_p_asks_for(count):
    """Also where the share of the total is a whole number of weights, or rounds to the total."""
    logits = np.full(700, -50.0, dtype=np.float32)
    logits[-count:] = 1.0
    for top_p, expected in ((0.0, 1), (0.5, -(-count // 2)), (1 - 2.0**-53, count)):
        ids, _ = candidates(logits, asked(temperature=1.0, top_p=top_p))
        assert ids.tolist() == list(range(700 - count, 700 - count + expected))


@pytest.mark.parametrize("vocab", [1, 2, 3, 1000, 49_152, 262_144])
def test_sums_of_whole_units_are_exact(vocab):
    assert 2**52 < sampler.units(vocab) * vocab <= 2**53


@given(st.one_of(anything, accepted), rows_of_logits, st.lists(st.integers(0, 60), max_size=20), st.data())
@settings(max_examples=400, deadline=None)
def test_any_sampling_of_any_finite_logits_draws_a_token_with_positive_weight(sampling, values, tokens, data):
    logits = torch.tensor(values, dtype=torch.float32)
    before = logits.clone()
    prompt_tokens = data.draw(st.integers(0, len(tokens)))
    context = {"tokens": tokens, "prompt_tokens": prompt_tokens}
    drawn = sample(logits, sampling, **context)
    assert torch.equal(logits, before)
    assert 0 <= drawn.token < len(values)
    after = adjusted(logits.numpy(), sampling, **context)
    assert np.isfinite(after).all()
    if np.float32(finite(sampling.temperature)) > 0:
        ids, weights = candidates(after, sampling)
        assert (np.diff(ids) > 0).all() and np.isfinite(weights).all() and weights.max() == 1
        assert weights[ids == drawn.token] > 0
    else:
        assert drawn.token == int(after.argmax())
    if sampling.logprobs is not None:
        assert math.isfinite(drawn.logprob) and drawn.logprob < 1e-3
        assert len(drawn.top) == min(max(sampling.logprobs, 0), len(values))
        assert [value for _, value in drawn.top] == sorted((v for _, v in drawn.top), reverse=True)
