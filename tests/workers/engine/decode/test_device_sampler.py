"""A batch drawn in one pass on a device, against the sampler that draws each row alone."""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.errors import FarshoreError
from farshore.kernels.runtime.cuda import CudaRuntime
from farshore.kernels.runtime.deferring import DeferringRuntime
from farshore.kernels.runtime.immediate import ImmediateRuntime
from farshore.sampling import Sampling
from farshore.workers.engine.constraints.token_mask import TokenMask
from farshore.workers.engine.decode.device_sampler import DrawBatch
from farshore.workers.engine.decode.sampler import sample
from farshore.workers.engine.penalties import TokenCounts

from .strategies import accepted, anything, logit

RUNTIME = CudaRuntime(torch.device("cuda:0")) if torch.cuda.is_available() else DeferringRuntime(seed=1)
DEVICE = RUNTIME.device
TOKENS = [5, 17, 17, 400, 999, 3, 3, 3]


@dataclass
class Row:
    """A row's options and its context."""

    sampling: Sampling
    tokens: list[int] = field(default_factory=lambda: list(TOKENS))
    prompt_tokens: int = 4
    choice: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()

    def context(self, vocab):
        return {
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "choice": self.choice,
            "counts": TokenCounts(),
            "mask": TokenMask.of(self.sampling, vocab=vocab, bad_words=self.bad_words),
        }


def batch_of(logits, rows, order=None):
    """What one pass draws; an error of a row's mask in its place."""
    vocab = logits.shape[-1]
    batch, drawn, added = DrawBatch(vocab), [None] * len(rows), []
    for index in order or range(len(rows)):
        try:
            batch.add(index, rows[index].sampling, **rows[index].context(vocab))
            added.append(index)
        except FarshoreError as error:
            drawn[index] = error
    for index, result in zip(added, batch.draw(logits, RUNTIME), strict=True):
        drawn[index] = result
    return drawn


def each_alone(logits, rows):
    drawn = []
    for row, of_row in zip(logits.cpu(), rows, strict=True):
        try:
            drawn.append(sample(row, of_row.sampling, **of_row.context(len(row))))
        except FarshoreError as error:
            drawn.append(error)
    return drawn


def check_equal(drawn, expected):
    for ours, theirs in zip(drawn, expected, strict=True):
        if isinstance(theirs, FarshoreError):
            assert str(ours) == str(theirs)
            continue
        assert ours.token == theirs.token
        assert (ours.logprob is None) == (theirs.logprob is None)
        if theirs.logprob is not None:
            assert ours.logprob == pytest.approx(theirs.logprob, rel=1e-12, abs=1e-9)
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
        values = [value for _, value in theirs.top]
        assert [value for _, value in ours.top] == pytest.approx(values, rel=1e-12, abs=1e-9)


@st.composite
def batches(draw):
    """Rows of any options over any logits of one vocabulary, some of them damaged."""
    vocab = draw(st.integers(1, 40) | st.integers(250, 600))
    ids = st.integers(0, vocab + 3)
    restricted = {
        "allowed_token_ids": st.just(()) | st.lists(ids, max_size=5).map(tuple),
        "min_tokens": st.integers(0, 8),
        "stop_token_ids": st.frozensets(ids, max_size=3),
    }
    rows, logits = [], []
    for _ in range(draw(st.integers(1, 5))):
        sampling = draw(st.one_of(anything, accepted))
        if draw(st.booleans()):
            sampling = replace(sampling, **{name: draw(values) for name, values in restricted.items()})
        tokens = draw(st.lists(ids, max_size=20))
        words = draw(st.lists(st.lists(ids, min_size=1, max_size=2).map(tuple), max_size=2))
        prompt_tokens = draw(st.integers(0, len(tokens)))
        rows.append(Row(sampling, tokens, prompt_tokens, draw(st.integers(0, 3)), tuple(words)))
        values = draw(st.lists(logit, min_size=1, max_size=5))
        if draw(st.integers(0, 9)) == 0:
            values.append(draw(st.sampled_from([math.nan, math.inf, -math.inf])))
        logits.append([values[i % len(values)] for i in range(vocab)])
    return torch.tensor(logits, dtype=torch.float32, device=DEVICE), rows


@given(batches(), st.randoms(use_true_random=False))
@settings(max_examples=400, deadline=None)
def test_a_batch_draws_what_each_row_draws_alone(batch, random):
    """Whatever the other rows ask for, and in any order."""
    logits, rows = batch
    before = logits.clone()
    order = list(range(len(rows)))
    random.shuffle(order)
    check_equal(batch_of(logits, rows, order), each_alone(logits, rows))
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())


def test_weights_that_differ_by_a_last_bit_are_kept_alike():
    """The other tokens have weights of 1 - 5.55e-17: in float64 1, or the number below 1."""
    row = Row(Sampling(temperature=6755399172620288.0, min_p=1.0, logit_bias={0: 0.375}))
    logits = torch.zeros(1, 8, device=DEVICE)
    check_equal(batch_of(logits, [row]), each_alone(logits, [row]))
    assert all(batch_of(logits, [replace(row, choice=choice)])[0].token == 0 for choice in range(8))


def test_a_damaged_row_without_a_token_gets_one_error():
    """The host knows the mask before it knows the logits, so the mask's error comes first everywhere."""
    row = Row(Sampling(allowed_token_ids=(7,)), tokens=[], prompt_tokens=0)
    logits = torch.full((1, 3), math.nan, device=DEVICE)
    (drawn,), (expected,) = batch_of(logits, [row]), each_alone(logits, [row])
    assert "no token may follow" in str(expected)
    assert str(drawn) == str(expected)


USUAL = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 40, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 300, "top_p": 0.95, "repetition_penalty": 1.2, "logprobs": 3},
    {"temperature": 0.9, "min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logprobs": 0},
    {"temperature": 2.0, "logit_bias": {17: 8.0, 5: -100.0}, "allowed_token_ids": tuple(range(0, 49_152, 3))},
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_of_a_whole_vocabulary_are_equal(dtype):
    """Logits that came from bfloat16 have many ties."""
    generator = torch.Generator().manual_seed(7)
    for step in range(4):
        logits = (torch.randn(len(USUAL), 49_152, generator=generator) * 3).to(dtype).float()
        rows = [
            Row(Sampling(seed=100 * step + index, **options), tokens=TOKENS + [step] * (step % 7))
            for index, options in enumerate(USUAL)
        ]
        check_equal(batch_of(logits.to(DEVICE), rows), each_alone(logits, rows))


def test_a_single_stage_is_drawn_alike():
    """A batch without the stages that others ask for: top-k without a sort, temperature alone, none."""
    generator = torch.Generator().manual_seed(8)
    for step in range(8):
        logits = torch.randn(3, 3_000, generator=generator) * 3
        for options in ({"top_k": 5}, {"top_k": 5, "min_p": 0.3}, {}, {"top_p": 0.5}):
            rows = [Row(Sampling(temperature=t, seed=step, **options)) for t in (0.0, 0.8, 1.7)]
            check_equal(batch_of(logits.to(DEVICE), rows), each_alone(logits, rows))


def test_rows_may_be_drawn_from_twice_and_left_out():
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(9)) * 3
    batch, expected = DrawBatch(100), []
    for choice, index in enumerate([2, 2, 0]):
        row = Row(Sampling(temperature=1.0, seed=4), tokens=[1, 2], choice=choice)
        batch.add(index, row.sampling, **row.context(100))
        expected.append(sample(logits[index], row.sampling, **row.context(100)))
    check_equal(batch.draw(logits.to(DEVICE), RUNTIME), expected)
    assert len(batch) == 3 and DrawBatch(100).draw(logits, RUNTIME) == []


def test_what_is_added_stays_as_it_was():
    """The counts and tokens of a sequence go on to its next row."""
    logits = torch.randn(2, 1_000, generator=torch.Generator().manual_seed(10))
    logits[:, 3] = 9.0
    sampling = Sampling(temperature=0.0, repetition_penalty=50.0, frequency_penalty=1.0)
    tokens, counts, batch = [7], TokenCounts(), DrawBatch(1_000)
    batch.add(0, sampling, tokens=tokens, prompt_tokens=1, counts=counts)
    tokens.append(3)
    batch.add(1, sampling, tokens=tokens, prompt_tokens=1, counts=counts)
    counts.truncate(0)
    first, second = batch.draw(logits.to(DEVICE), RUNTIME)
    assert (
        first.token == 3
        and second.token
        == sample(logits[1], sampling, tokens=[7, 3], prompt_tokens=1, counts=TokenCounts()).token
        != 3
    )


def test_a_mask_is_returned_so_that_guesses_can_be_checked():
    row = Row(Sampling(allowed_token_ids=(3, 4)))
    batch = DrawBatch(10)
    assert np.flatnonzero(batch.add(0, row.sampling, **row.context(10))).tolist() == [3, 4]
    assert batch.add(0, Sampling(), **Row(Sampling()).context(10)) is None


@pytest.mark.parametrize("options", USUAL, ids=str)
def test_nothing_is_computed_on_another_device(options):
    """On PyTorch's meta device, which has no contents: no tensor on the CPU is mixed in, nothing is read."""
    device = torch.device("meta")
    batch = DrawBatch(1_000)
    for index, sampling in enumerate((Sampling(**options), Sampling(**options | {"logprobs": 3}))):
        if "allowed_token_ids" in options:
            sampling = replace(sampling, allowed_token_ids=(3, 4))
        batch.add(index, sampling, **Row(sampling).context(1_000))
    answer = batch.compute(torch.empty(2, 1_000, device=device), ImmediateRuntime(device))
    assert answer.device == device and answer.shape == (2, 2 + 1 + 2 * 3)
