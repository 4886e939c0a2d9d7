"""Incremental counts of token ids equal a recount, and the penalties computed from both are bitwise equal."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.sampling import Sampling
from farshore.workers.engine.decode.sampler import adjusted
from farshore.workers.engine.penalties import TokenCounts

VOCAB = 50
ids = st.integers(0, VOCAB - 1)


def recounted(row, sampling, tokens, prompt_tokens):
    """Applies the penalties with counts of the whole context."""
    row = row.copy()
    if sampling.repetition_penalty != 1.0:
        marks = np.zeros(row.size, dtype=bool)
        marks[np.asarray(tokens, dtype=np.int64)] = True
        seen = np.flatnonzero(marks)
        values, penalty = row[seen], np.float32(sampling.repetition_penalty)
        row[seen] = np.where(values > 0, values / penalty, values * penalty)
    if len(tokens) > prompt_tokens:
        generated, counts = np.unique(np.asarray(tokens[prompt_tokens:]), return_counts=True)
        row[generated] -= sampling.presence_penalty + sampling.frequency_penalty * counts.astype(np.float32)
    return row


@given(
    prompt=st.lists(ids, max_size=20),
    steps=st.lists(st.tuples(st.integers(0, 8), st.lists(ids, max_size=6)), max_size=12),
    knobs=st.tuples(st.floats(0.1, 3.0), st.floats(-2.0, 2.0), st.floats(-2.0, 2.0)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=200, deadline=None)
def test_updates_of_a_truncated_and_forked_sequence_equal_a_recount(prompt, steps, knobs, seed):
    """Each step truncates the sequence, as a failed step does, may fork it, and draws some tokens."""
    logits = np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32)
    repetition, presence, frequency = knobs
    sampling = Sampling(
        max_tokens=1,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    tokens, counts = list(prompt), TokenCounts()
    abandoned_forks: list[tuple[TokenCounts, list[int]]] = []
    for cut, drawn in steps:
        if cut % 3 == 0:
            abandoned_forks.append((counts, list(tokens)))
            counts = counts.copy()
        del tokens[max(len(prompt), len(tokens) - cut) :]
        for token in [*drawn, None]:
            ours = adjusted(logits, sampling, tokens=tokens, prompt_tokens=len(prompt), counts=counts)
            expected = recounted(logits, sampling, tokens, len(prompt))
            assert (ours.view(np.int32) == expected.view(np.int32)).all()
            tokens += [] if token is None else [token]
    for fork, of_fork in abandoned_forks:
        ours = adjusted(logits, sampling, tokens=of_fork, prompt_tokens=len(prompt), counts=fork)
        expected = recounted(logits, sampling, of_fork, len(prompt))
        assert (ours.view(np.int32) == expected.view(np.int32)).all()


def test_ids_are_in_order_of_first_occurrence():
    counts = TokenCounts()
    counts.update([7, 5, 5], 3)
    assert counts.ids.tolist() == [7, 5] and counts.generated[0].size == 0
    counts.update([7, 5, 5, 9, 5, 9], 3)
    assert counts.ids.tolist() == [7, 5, 9]
    assert [values.tolist() for values in counts.generated] == [[9, 5], [2, 1]]
    counts.update([7, 5, 5, 9], 3)
    assert counts.ids.tolist() == [7, 5, 9]
    assert [values.tolist() for values in counts.generated] == [[9], [1]]
    counts.update([7, 5, 5], 3)
    assert counts.ids.tolist() == [7, 5] and counts.generated[0].size == 0


def test_another_prompt_is_counted_from_its_start():
    counts = TokenCounts()
    counts.update([1, 2, 3], 1)
    counts.update([1, 2, 3, 4], 3)
    assert counts.ids.tolist() == [1, 2, 3, 4]
    assert [values.tolist() for values in counts.generated] == [[4], [1]]


def test_ids_outside_the_vocabulary_are_ignored():
    row = np.array([4.0, -2.0, 1.0], dtype=np.float32)
    prompt, completion = [-1, 0, 3, 1 << 40], [7, 2, -3, 2]
    sampling = Sampling(repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=0.5)
    ours = adjusted(row, sampling, tokens=prompt + completion, prompt_tokens=4, counts=TokenCounts())
    assert ours.tolist() == [2.0, -2.0, -1.5]
