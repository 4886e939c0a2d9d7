"""Draws from the rows of a step, computed together on a device, against those computed one by one."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.errors import FarshoreError
from farshore.gateway.requests.structure import grammar_of
from farshore.ids import Epoch, SequenceId
from farshore.kernels.runtime.deferring import DeferringRuntime
from farshore.kernels.runtime.immediate import ImmediateRuntime
from farshore.proto import inference_pb2 as api
from farshore.sampling import Sampling
from farshore.workers.engine.constraints.grammar import GrammarCompiler
from farshore.workers.engine.constraints.token_mask import TokenMask
from farshore.workers.engine.decode.draws import draws_of
from farshore.workers.engine.decode.step_entry import StepEntry, draw_tokens
from farshore.workers.engine.sequence import Sequence

PROMPT = [5, 6, 7]
VOCAB = 60


def sequence(sampling, *, vocab=VOCAB, grammar=None, choice=0, bad_words=()):
    return Sequence(
        id=SequenceId("s"),
        epoch=Epoch(1),
        order=0,
        prompt_tokens=len(PROMPT),
        tokens=list(PROMPT),
        sampling=sampling,
        emit=lambda event: None,
        arrived_s=0.0,
        fingerprint=b"",
        choice=choice,
        mask=TokenMask.of(sampling, vocab=vocab, grammar=grammar, bad_words=bad_words),
    )


RUNTIMES = (ImmediateRuntime(), DeferringRuntime(seed=1))
"""Of the host, and of a device."""


def both_ways(sequences, guesses, logits):
    """Draws the same step twice: one by one on the host, and together as on a device. Checks that both give
    the same, and returns the entries of the second."""
    results = []
    for runtime, of_side in zip(RUNTIMES, sequences, strict=True):
        entries = [StepEntry(s, list(guessed), []) for s, guessed in zip(of_side, guesses, strict=True)]
        draw_tokens(entries, logits, runtime)
        results.append(entries)
    for alone, together in zip(*results, strict=True):
        assert [drawn.token for drawn in alone.drawn] == [drawn.token for drawn in together.drawn]
        assert alone.sequence.tokens == together.sequence.tokens
        assert str(alone.error) == str(together.error)
    return results[1]


options = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.7]),
        "allowed_token_ids": st.just(())
        | st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6).map(tuple),
        "min_tokens": st.sampled_from([0, 5]),
        "stop_token_ids": st.sampled_from([frozenset(), frozenset({1, 2, 3})]),
        "max_tokens": st.sampled_from([4, 100]),
        "seed": st.integers(0, 9),
    }
)


@given(st.lists(options, min_size=1, max_size=4), st.integers(0, 1 << 30))
@settings(max_examples=60, deadline=None)
def test_steps_with_guesses_draw_the_same(chosen, seed):
    """Right and wrong guesses over several steps: the state of a sequence goes on from what was drawn."""
    picks, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    sides = [
        [sequence(Sampling(**knobs), choice=i, bad_words=((9,), (10, 11))) for i, knobs in enumerate(chosen)]
        for _ in range(2)
    ]
    for _ in range(4):
        # A few likely tokens, so that guesses are often right.
        counts = [picks.randrange(4) for _ in chosen]
        guesses = [[picks.choice([8, 9, 10, 11]) for _ in range(count)] for count in counts]
        logits = torch.randn(len(chosen) + sum(counts), VOCAB, generator=generator)
        logits[:, 8:12] += 6.0
        if picks.randrange(4) == 0:
            logits[picks.randrange(len(logits)), 5] = torch.nan
        for entry in both_ways(sides, guesses, logits):
            assert entry.drawn or entry.error is not None


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_a_grammar_is_followed_past_guesses_of_any_kind(tokenizer):
    """Guesses that the grammar forbids, that are not drawn, and that are right."""
    compiler = GrammarCompiler(lambda: tokenizer, vocab=tokenizer.vocab_size, eos_ids=[2])
    grammar = grammar_of(api.Structure(json_schema=json.dumps(SCHEMA)))
    sampling = Sampling(temperature=1.0, seed=3, stop_token_ids=frozenset({2}))
    sides = [
        [sequence(sampling, vocab=tokenizer.vocab_size, grammar=compiler.compile(grammar))] for _ in range(2)
    ]
    text = tokenizer.encode('{"name": "Ann", "age": 41}', add_special_tokens=False)
    generator, picks = torch.Generator().manual_seed(4), random.Random(5)
    ours = sides[1][0]
    while ours.finish_reason() is None:
        done = ours.completion_tokens
        wrong = picks.choice([[], [0], [tokenizer.vocab_size - 1], text[:1]])
        guesses = [*text[done : done + picks.randrange(3)], *wrong]
        logits = torch.randn(1 + len(guesses), tokenizer.vocab_size, generator=generator)
        for row, likely in enumerate(text[done : done + len(logits)] or [2]):
            if row < len(logits):
                logits[row, likely] += 12.0 + 6.0 * picks.randrange(2)
        (entry,) = both_ways(sides, [guesses], logits)
        assert entry.error is None
        for side in sides:
            side[0].mask.prepare(side[0].tokens, len(PROMPT))
        assert ours.completion_tokens < 200
    answer = json.loads(tokenizer.decode(ours.tokens[len(PROMPT) : -1]))
    assert answer.keys() == {"name", "age"}


def test_completions_are_drawn_from_one_row():
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(6))
    sides = [[sequence(Sampling(temperature=2.0), choice=i) for i in range(8)] for _ in RUNTIMES]
    entries = both_ways(sides, [[]] * 8, logits.expand(8, -1))
    assert len({entry.drawn[0].token for entry in entries}) > 2


@pytest.mark.parametrize("runtime", RUNTIMES, ids=["host", "device"])
def test_an_error_is_of_one_sequence(runtime):
    logits = torch.zeros(3, VOCAB)
    logits[1, 4] = torch.inf
    draws = draws_of([(sequence(Sampling()), []) for _ in range(3)], logits, runtime)
    assert draws[0](0).token == draws[2](0).token == 0
    with pytest.raises(FarshoreError, match="not numbers"):
        draws[1](0)
