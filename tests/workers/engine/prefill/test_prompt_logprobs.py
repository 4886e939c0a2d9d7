"""Log-probabilities of a prompt's tokens: exact, of bounded memory, and not changed by what is stored."""

import math

import pytest
import torch

from farshore.errors import TransportError
from farshore.models.llama import Llama
from farshore.sampling import Sampling
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.sequence import Failed, Finished, PromptToken

MEMORY_BYTES = 64 << 20
LOGITS_BYTES = "farshore.workers.engine.prefill.segment.LOGITS_BYTES"
ASKED = Sampling(max_tokens=4, prompt_logprobs=3)


def prompt_of(length, seed=0):
    return torch.randint(97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def check_prompt(tiny):
    """check_prompt(prompt, PromptTokens, alternatives): the values are those of transformers."""

    def check(prompt, found, alternatives=3):
        assert [token.token_id for token in found] == prompt
        assert found[0] == PromptToken(prompt[0], None, 0, ())
        with torch.inference_mode():
            logits = tiny(torch.tensor([prompt])).logits[0, :-1].double()
        for token, row in zip(found[1:], torch.log_softmax(logits, dim=-1), strict=True):
            assert token.logprob == pytest.approx(float(row[token.token_id]), abs=1e-4)
            least, most = (1 + int((row > row[token.token_id] + gap).sum()) for gap in (1e-4, -1e-4))
            assert least <= token.rank <= most, "a rank is sure up to rounding"
            others, values = zip(*token.top, strict=True)
            assert list(values) == sorted(values, reverse=True)
            assert list(values) == pytest.approx(row.topk(alternatives).values.tolist(), abs=1e-4)
            assert list(values) == pytest.approx(row[list(others)].tolist(), abs=1e-4)
            assert len(set(others)) == alternatives

    return check


@pytest.mark.parametrize(
    "options",
    [{"local": True}, {"shards": 3, "shard_by": "head"}, {"shards": 5, "shard_by": "both"}],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 2, 256, 257, 700])
def test_they_are_those_of_transformers(
    tiny_model, rig, submit, greedy, check_prompt, monkeypatch, options, length
):
    """Segments of 256 tokens, logits of 10 rows at a time and no more."""
    compute, rows = tiny_model.logits, []
    monkeypatch.setattr(tiny_model, "logits", lambda h: rows.append(len(h)) or compute(h))
    monkeypatch.setattr(LOGITS_BYTES, 10 * 97 * 4)
    engine = rig(tiny_model, memory_bytes=MEMORY_BYTES, **options).start(
        limits=EngineLimits(segment_tokens=256)
    )
    prompt = prompt_of(length)
    collected = submit(engine, "a", prompt, ASKED)
    assert isinstance(collected.result(), Finished)
    check_prompt(prompt, collected.prompt)
    assert collected.tokens == greedy(prompt, 4)
    assert max(rows) == min(10, max(1, length - 1))


def test_no_alternatives_and_none_asked_for(tiny_model, rig, submit):
    engine = rig(tiny_model, memory_bytes=MEMORY_BYTES).start()
    bare = submit(engine, "a", prompt_of(20), Sampling(max_tokens=1, prompt_logprobs=0))
    plain = submit(engine, "b", prompt_of(20), Sampling(max_tokens=1))
    assert isinstance(bare.result(), Finished) and isinstance(plain.result(), Finished)
    assert len(bare.prompt) == 20 and all(token.top == () for token in bare.prompt)
    assert plain.prompt == []


def test_a_stored_prefix_is_computed_again(tiny_model, rig, submit, check_prompt):
    engine = rig(tiny_model, memory_bytes=MEMORY_BYTES).start()
    prompt = prompt_of(600)
    assert submit(engine, "a", prompt, Sampling(max_tokens=1)).result().cached_tokens == 0
    collected = submit(engine, "b", prompt, ASKED)
    assert collected.result().cached_tokens == 0
    check_prompt(prompt, collected.prompt)
    assert submit(engine, "c", prompt, Sampling(max_tokens=1)).result().cached_tokens == 512


def test_several_choices_get_the_prompts_values_once(tiny_model, rig, submit, check_prompt):
    engine = rig(tiny_model, memory_bytes=MEMORY_BYTES).start()
    prompt = prompt_of(300)
    sampling = Sampling(max_tokens=4, temperature=1.0, n=3, prompt_logprobs=3)
    collected = submit(engine, "a", prompt, sampling)
    collected.results(3)
    check_prompt(prompt, collected.prompt)


class Failing:
    """A store whose seals fail at the chosen calls, as over a network."""

    def __init__(self, store, broken):
        self._store = store
        self._broken = broken
        self.seals = 0

    def __getattr__(self, name):
        return getattr(self._store, name)

    def seal(self, *args, **options):
        self.seals += 1
        if self.seals in self._broken:
            raise TransportError("seal broke")
        return self._store.seal(*args, **options)


def test_a_prompt_that_is_placed_again_repeats_and_loses_none(tiny_model, rig, submit, check_prompt):
    """A seal fails: the values of that segment are computed again, those of segments before it are not."""
    cluster = rig(tiny_model, shards=1, memory_bytes=MEMORY_BYTES)
    (worker,) = cluster.targets
    failing = cluster.clients[worker].store = Failing(cluster.clients[worker].store, {2, 4})
    prompt = prompt_of(900)
    collected = submit(cluster.start(limits=EngineLimits(segment_tokens=256)), "a", prompt, ASKED)
    assert isinstance(collected.result(), Finished)
    check_prompt(prompt, collected.prompt)
    assert failing.seals == 6


def test_a_request_that_ran_is_parked_without_asking_again(tiny_model, rig, submit, check_prompt):
    """Memory for two of the three requests: one is parked while it decodes, and prefilled anew."""
    cluster = rig(tiny_model, shards=2, memory_bytes=MEMORY_BYTES)
    cluster.resize(2 * cluster.attention.layouts[0].block_bytes)
    engine = cluster.start()
    prompts = [prompt_of(250, seed) for seed in range(3)]
    asked = Sampling(max_tokens=600, prompt_logprobs=3)
    running = [submit(engine, f"r{i}", prompt, asked) for i, prompt in enumerate(prompts)]
    for prompt, collected in zip(prompts, running, strict=True):
        assert isinstance(collected.result(), Finished)
        check_prompt(prompt, collected.prompt)
    assert engine.load().parkings > 0


def test_damaged_weights_are_told(tiny_model, rig, submit):
    norm = torch.full_like(tiny_model.weights.norm, math.nan)
    model = Llama(tiny_model.config, tiny_model.weights._replace(norm=norm))
    result = submit(rig(model, memory_bytes=MEMORY_BYTES).start(), "a", prompt_of(30), ASKED).result()
    assert isinstance(result, Failed) and "are damaged" in str(result.error)
