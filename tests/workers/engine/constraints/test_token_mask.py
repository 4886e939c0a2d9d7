"""Masks of tokens: by grammar, by allowed ids, by bad words, by the least number of tokens."""

import json

import numpy as np
import pytest
import torch

from farshore.errors import FarshoreError, InvalidRequest
from farshore.gateway.requests.structure import grammar_of
from farshore.proto import inference_pb2 as api
from farshore.sampling import Sampling
from farshore.workers.engine.constraints.grammar import GrammarCompiler
from farshore.workers.engine.constraints.token_mask import TokenMask
from farshore.workers.engine.decode.sampler import sample
from farshore.workers.engine.penalties import TokenCounts

PROMPT = [5, 6, 7]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(lambda: tokenizer, vocab=tokenizer.vocab_size, eos_ids=[2])


@pytest.fixture
def grammar(compiler):
    return lambda **structure: compiler.compile(grammar_of(api.Structure(**structure)))


def ids_of(mask):
    return set(np.flatnonzero(mask).tolist())


def test_a_grammar_allows_a_text_and_its_end_only(grammar, tokenizer):
    state = grammar(choice=api.Choices(texts=["yes", "no"]))
    tokens = list(PROMPT)
    first = ids_of(state.mask(tokens, len(PROMPT)))
    assert {tokenizer.decode([token]) for token in first} == {"y", "ye", "yes", "n", "no"}
    tokens += tokenizer.encode("yes", add_special_tokens=False)
    assert ids_of(state.mask(tokens, len(PROMPT))) == {2}


def test_a_mask_is_the_same_computed_beside_and_after_a_step_back(grammar, tokenizer):
    text = tokenizer.encode('{"name": "Ann", "age": 41}', add_special_tokens=False)
    plain, beside = (grammar(json_schema=json.dumps(SCHEMA)) for _ in range(2))
    for length in range(len(text) + 1):
        tokens = [*PROMPT, *text[:length]]
        expected = plain.mask(tokens, len(PROMPT))
        beside.prepare(tokens, len(PROMPT))
        assert (beside.mask(tokens, len(PROMPT)) == expected).all()
    # A step that failed is run again: its tokens are taken back.
    back = [*PROMPT, *text[:4]]
    beside.prepare([*PROMPT, *text], len(PROMPT))
    assert (beside.mask(back, len(PROMPT)) == grammar_at(grammar, back)).all()


def grammar_at(grammar, tokens):
    return grammar(json_schema=json.dumps(SCHEMA)).mask(tokens, len(PROMPT))


def test_a_copy_goes_its_own_way(grammar, tokenizer):
    state = grammar(choice=api.Choices(texts=["yes", "no"]))
    state.prepare(PROMPT, len(PROMPT))
    copy = state.copy()
    yes = [*PROMPT, *tokenizer.encode("yes", add_special_tokens=False)]
    assert ids_of(copy.mask(yes, len(PROMPT))) == {2}
    assert len(ids_of(state.mask(PROMPT, len(PROMPT)))) == 5


def test_a_token_outside_the_grammar_is_an_error(grammar, tokenizer):
    state = grammar(regex="[0-9]+")
    with pytest.raises(FarshoreError, match="can't follow its grammar after 1 tokens"):
        state.mask([*PROMPT, tokenizer.encode("x")[0]], len(PROMPT))


def test_a_grammar_that_is_wrong_is_refused(compiler):
    with pytest.raises(InvalidRequest, match="the grammar can't be used"):
        compiler.compile("start: nothing")


def test_draws_at_any_temperature_follow_the_grammar(grammar, tokenizer):
    generator = torch.Generator().manual_seed(3)
    for seed in range(3):
        sampling = Sampling(temperature=2.0, seed=seed, top_k=5)
        mask = TokenMask.of(
            sampling, vocab=tokenizer.vocab_size, grammar=grammar(json_schema=json.dumps(SCHEMA))
        )
        tokens, counts = list(PROMPT), TokenCounts()
        while tokens[-1] != 2:
            logits = torch.randn(tokenizer.vocab_size, generator=generator) * 5
            drawn = sample(logits, sampling, tokens=tokens, prompt_tokens=3, counts=counts, mask=mask)
            tokens.append(drawn.token)
            assert len(tokens) < 500
        answer = json.loads(tokenizer.decode(tokens[3:]))
        assert answer.keys() == {"name", "age"} and isinstance(answer["age"], int)


def test_nothing_asked_is_no_mask():
    assert TokenMask.of(Sampling(), vocab=10) is None


def test_allowed_ids_alone_are_drawn():
    mask = TokenMask.of(Sampling(allowed_token_ids=(3, 4, 99)), vocab=10)
    assert ids_of(mask.allowed(PROMPT, 3)) == {3, 4}


def test_end_tokens_wait_for_min_tokens():
    mask = TokenMask.of(Sampling(min_tokens=2, stop_token_ids=frozenset({1, 2})), vocab=5)
    assert ids_of(mask.allowed(PROMPT, 3)) == {0, 3, 4}
    assert ids_of(mask.allowed([*PROMPT, 3], 3)) == {0, 3, 4}
    assert ids_of(mask.allowed([*PROMPT, 3, 3], 3)) == {0, 1, 2, 3, 4}


def test_a_bad_word_is_never_completed():
    mask = TokenMask.of(Sampling(), vocab=6, bad_words=[(1,), (2, 3, 4)])
    assert ids_of(mask.allowed(PROMPT, 3)) == {0, 2, 3, 4, 5}
    assert ids_of(mask.allowed([*PROMPT, 2, 3], 3)) == {0, 2, 3, 5}
    # The prompt's tokens begin no bad word.
    assert ids_of(mask.allowed([2, 3], 2)) == {0, 2, 3, 4, 5}


def test_a_grammar_goes_before_min_tokens(grammar, tokenizer):
    sampling = Sampling(min_tokens=9, stop_token_ids=frozenset({2}))
    mask = TokenMask.of(
        sampling, vocab=tokenizer.vocab_size, grammar=grammar(choice=api.Choices(texts=["no"]))
    )
    no = [*PROMPT, *tokenizer.encode("no", add_special_tokens=False)]
    assert ids_of(mask.allowed(no, 3)) == {2}


def test_ids_that_leave_a_grammar_no_token_are_an_error(grammar, tokenizer):
    mask = TokenMask.of(
        Sampling(allowed_token_ids=(2,)), vocab=tokenizer.vocab_size, grammar=grammar(regex="[0-9]+")
    )
    with pytest.raises(FarshoreError, match="no token may follow"):
        mask.allowed(PROMPT, 3)
