"""Guesses change the number of steps, never a token; a step that breaks changes nothing."""

import re
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from farshore.errors import TransportError
from farshore.gateway.requests.structure import grammar_of
from farshore.proto import inference_pb2 as api
from farshore.sampling import Sampling
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.constraints.grammar import GrammarCompiler
from farshore.workers.engine.constraints.token_mask import TokenMask
from farshore.workers.engine.lookup import NGRAMS, PromptLookup
from farshore.workers.engine.sequence import Finished, Reason

REPEATING = [5, 6, 7, 8, 9, 10, 11, 12] * 6


def prompt_of(length, seed=0):
    return torch.randint(97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def slow_propose(tokens, most):
    for n in NGRAMS:
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[-n:]:
                return tokens[start + n : start + n + most]
    return []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 256, 65536, 1 << 24]), min_size=1, max_size=60), st.integers(1, 5))
def test_a_guess_continues_the_newest_earlier_copy(tokens, most):
    lookup = PromptLookup(8)
    for end in range(1, len(tokens) + 1):
        assert lookup.propose(tokens[:end], most) == slow_propose(tokens[:end], most)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.lists(st.sampled_from([0, 1, 256]), max_size=6)), max_size=20)
)
def test_guesses_from_tokens_that_a_failed_step_truncated(steps):
    lookup, tokens = PromptLookup(8), []
    for cut, drawn in steps:
        del tokens[max(0, len(tokens) - cut) :]
        assert lookup.propose(tokens, 4) == slow_propose(tokens, 4)
        tokens += drawn
        assert lookup.propose(tokens, 4) == slow_propose(tokens, 4)


def test_fewer_guesses_while_they_are_wrong():
    tokens = list(range(20)) + list(range(10))
    lookup = PromptLookup(8)
    sizes = []
    for accepted in (0, 0, 0, 0, 1, 2, 4, 8):
        sizes.append(len(lookup.propose(tokens, 100)))
        lookup.record(sizes[-1], accepted)
    assert sizes == [8, 4, 2, 1, 1, 2, 4, 8]


class CountingClient:
    """A shard client that counts the steps that begin at its shard."""

    def __init__(self, client):
        self._client = client
        self.steps = 0

    def __getattr__(self, name):
        return getattr(self._client, name)

    def begin(self, step, **options):
        self.steps += 1
        self._client.begin(step, **options)


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}, {"repetition_penalty": 1.3}]
)
def test_tokens_equal_those_without_guesses(tiny_model, rig, submit, sampling):
    """The answers cross block boundaries, so blocks are handed off from tails with guesses."""
    prompts = {"repeating": REPEATING, "random": prompt_of(250), "one": [3]}
    answers = []
    for guesses in (0, 5):
        cluster = rig(tiny_model, shards=2, memory_bytes=64 << 20, wrap=CountingClient)
        engine = cluster.start(limits=EngineLimits(speculate_tokens=guesses))
        running = {
            name: submit(engine, name, prompt, Sampling(max_tokens=300, **sampling))
            for name, prompt in prompts.items()
        }
        for collected in running.values():
            assert isinstance(collected.result(), Finished)
        answers.append({name: collected.tokens for name, collected in running.items()})
        answers.append(sum(cluster.clients[worker].steps for worker in cluster.targets))
    assert answers[0] == answers[2]
    if not sampling:
        assert answers[3] < answers[1], "no guess was right, on a model that repeats itself"


END = 95
GRAMMAR = "(abcd[a-z ]){12}"
"""Four of five tokens follow from those before, so many guesses are right; the fifth is the model's."""


@pytest.fixture(scope="module")
def grammars():
    """Of a vocabulary with a token for each printable character."""
    ids = {letter: index for index, letter in enumerate(["Ġ", *map(chr, range(33, 127))])}
    made = Tokenizer(models.BPE(vocab=ids | {"<end>": END}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    loaded = types.SimpleNamespace(backend=made, eos_ids=[END])
    return GrammarCompiler(lambda: loaded, vocab=97, eos_ids=[END])


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 3}], ids=["greedy", "seeded"])
def test_a_text_with_a_grammar_equals_that_without_guesses(tiny_model, rig, submit, grammars, sampling):
    prompt = [ord(letter) - 32 for letter in "abcd abcdzabcde" * 2]
    answers, steps = [], []
    for guesses in (0, 4):
        cluster = rig(tiny_model, memory_bytes=64 << 20, wrap=CountingClient)
        engine = cluster.start(limits=EngineLimits(speculate_tokens=guesses))
        asked = Sampling(max_tokens=100, stop_token_ids=frozenset({END}), **sampling)
        grammar = grammars.compile(grammar_of(api.Structure(regex=GRAMMAR)))
        mask = TokenMask(asked, vocab=97, grammar=grammar)
        collected = submit(engine, "a", prompt, asked, mask=mask)
        assert collected.result().reason is Reason.STOP
        answers.append(collected.tokens)
        steps.append(sum(cluster.clients[worker].steps for worker in cluster.targets))
    text = "".join(chr(token + 32) for token in answers[0][:-1])
    assert re.fullmatch(GRAMMAR, text) and answers[0] == answers[1]
    assert steps[1] < steps[0], "no guess was right, though most tokens follow from those before"


def test_a_stop_token_among_accepted_guesses_ends_the_answer(tiny_model, rig, submit):
    prompt = REPEATING
    plain = submit(rig(tiny_model, memory_bytes=64 << 20).start(), "a", prompt, Sampling(max_tokens=60))
    plain.result()
    stop = plain.tokens[40]
    for guesses in (0, 6):
        engine = rig(tiny_model, memory_bytes=64 << 20).start(limits=EngineLimits(speculate_tokens=guesses))
        collected = submit(engine, "a", prompt, Sampling(max_tokens=60, stop_token_ids=frozenset({stop})))
        assert collected.result().reason is Reason.STOP
        assert collected.tokens == plain.tokens[: plain.tokens.index(stop) + 1]


class BreakingClient:
    """A shard client on which every step breaks once, at its ``break_at``-th call; the retry succeeds."""

    def __init__(self, client):
        self._client = client
        self.break_at = None
        self.broken = 0
        self._call = 0
        self._failed = False

    def __getattr__(self, name):
        return getattr(self._client, name)

    def begin(self, step, **options):
        self._call = 0
        self._fail()
        self._client.begin(step, **options)

    def send(self, layer, micro_batch, q):
        self._fail()
        return self._client.send(layer, micro_batch, q)

    def wait(self, sent, **options):
        self._fail()
        return self._client.wait(sent, **options)

    def _fail(self):
        if self._call == self.break_at and not self._failed:
            self._failed = True
            self.broken += 1
            raise TransportError(f"broke at call {self.break_at}")
        self._failed = False if self._call == self.break_at else self._failed
        self._call += 1


def state_of(sequence):
    """Returns all state that a step must not change before its commit, with the bytes of the tail's KV."""
    tail = sequence.placed_tail
    k, v = tail.read_layers(tail.start, tail.end, dtype=torch.uint8)
    spans = [(s.span, s.first, s.last, s.sealed) for s in sequence.spans]
    counted = dict(sequence.attended_bytes)
    return sequence.committed, list(sequence.tokens), tail.start, tail.bytes, spans, counted, k, v


def equal_states(a, b):
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


def watched(engine):
    """Returns a list to which each failed step adds whether it left the state unchanged."""
    runner = engine._scheduler._runner
    outcomes, run_step = [], runner._run

    def run(entries):
        # Reserved room above the committed length is no state: a failed step gives it back.
        for entry in entries:
            entry.sequence.placed_tail.truncate(entry.sequence.committed)
        before = [state_of(entry.sequence) for entry in entries]
        try:
            run_step(entries)
        except TransportError:
            outcomes.append(all(map(equal_states, before, [state_of(entry.sequence) for entry in entries])))
            raise

    runner._run = run
    return outcomes


@pytest.mark.parametrize("guesses", [0, 4])
def test_a_step_that_breaks_at_any_stage_of_any_layer_loses_nothing(tiny_model, rig, submit, guesses):
    """Every step breaks once: at begin, at the send of layer 0, at its wait, and so on."""
    sampling = Sampling(max_tokens=20)
    limits = EngineLimits(speculate_tokens=guesses)
    stages = 1 + 2 * tiny_model.config.layers
    undisturbed = None
    for break_at in (None, *range(stages)):
        cluster = rig(tiny_model, shards=2, memory_bytes=64 << 20, wrap=BreakingClient)
        client = cluster.clients[cluster.targets[0]]
        client.break_at = break_at
        engine = cluster.start(limits=limits)
        outcomes = watched(engine)
        collected = submit(engine, "a", REPEATING + prompt_of(210), sampling)
        assert isinstance(collected.result(), Finished)
        assert len(outcomes) == client.broken and all(outcomes)
        undisturbed = undisturbed or collected.tokens
        assert collected.tokens == undisturbed
        assert (client.broken >= 5) == (break_at is not None)
