"""Names of generated tokens: the next turn of a conversation finds the KV of its own answer."""

import threading

import pytest
import torch

from farshore.errors import Full
from farshore.kvstore.store.arena.arena import stride_bytes
from farshore.sampling import Sampling
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.sequence import Finished, Prefilled, Sampled

from ...hold.endless import ENDLESS, end


def prompt_of(length, seed=0):
    return torch.randint(97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def answer(max_tokens, **options):
    return Sampling(max_tokens=max_tokens, temperature=0.0, **options)


PLACEMENTS = {
    "local": {"local": True, "shards": 0},
    "range": {"shards": 2},
    "head": {"shards": 3, "shard_by": "head"},
    "both": {"shards": 5, "shard_by": "both"},
}


@pytest.mark.parametrize("options", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("length", [40, 256, 300])
def test_a_second_turn_finds_the_blocks_of_the_first_answer(tiny_model, rig, submit, greedy, options, length):
    """Prompts that end within a block, and at one's end."""
    cluster = rig(tiny_model, memory_bytes=64 << 20, **options)
    engine = cluster.start()
    prompt = prompt_of(length)
    first = submit(engine, "first", prompt, answer(520))
    assert first.result().cached_tokens == 0
    conversation = [*prompt, *first.tokens, *prompt_of(30, 1)]
    cluster.settle()
    second = submit(engine, "second", conversation, answer(20))
    # The last token that was drawn has no KV.
    assert second.result().cached_tokens == (length + 519) // 256 * 256
    assert second.tokens == greedy(conversation, 20)


def test_each_choice_names_its_own_tokens(tiny_model, rig, submit, greedy):
    cluster = rig(tiny_model, shards=2, memory_bytes=64 << 20)
    engine = cluster.start()
    prompt = prompt_of(300)
    first = submit(engine, "first", prompt, Sampling(max_tokens=300, n=3, temperature=1.0, seed=4))
    first.results(3)
    cluster.settle()
    for choice, tokens in first.choices.items():
        conversation = [*prompt, *tokens, 5]
        second = submit(engine, f"second {choice}", conversation, answer(8))
        assert second.result().cached_tokens == 512
        assert second.tokens == greedy(conversation, 8)


def test_rejected_guesses_are_in_no_name(tiny_model, rig, submit, greedy):
    """With speculation the tail holds KV of guesses beyond the committed tokens."""
    cluster = rig(tiny_model, shards=2, memory_bytes=64 << 20)
    engine = cluster.start(limits=EngineLimits(speculate_tokens=4))
    prompt = prompt_of(64) * 3
    first = submit(engine, "first", prompt, answer(400))
    assert isinstance(first.result(), Finished)
    assert first.tokens == greedy(prompt, 400)
    cluster.settle()
    conversation = [*prompt, *first.tokens, 5]
    second = submit(engine, "second", conversation, answer(8))
    assert second.result().cached_tokens == 512
    assert second.tokens == greedy(conversation, 8)


@pytest.mark.parametrize("length", [256, 300])
def test_a_block_that_the_last_token_fills_is_stored_too(tiny_model, rig, submit, greedy, length):
    """Its hand-off starts when the sequence has ended, and the tail is freed after it."""
    cluster = rig(tiny_model, shards=2, memory_bytes=64 << 20)
    engine = cluster.start()
    prompt = prompt_of(length)
    first = submit(engine, "first", prompt, answer(513 - length))
    assert isinstance(first.result(), Finished)
    cluster.settle()
    conversation = [*prompt, *first.tokens, 5]
    second = submit(engine, "second", conversation, answer(8))
    assert second.result().cached_tokens == 512
    assert second.tokens == greedy(conversation, 8)


def test_the_last_block_of_a_cancelled_sequence_is_not_stored(tiny_model, rig, submit):
    cluster = rig(tiny_model, shards=1, memory_bytes=64 << 20)
    engine = cluster.start()
    collected = submit(engine, "a", prompt_of(255), ENDLESS)
    assert isinstance(collected.events.get(timeout=60), Sampled | Prefilled)
    end(engine, "a", collected)
    cluster.check_empty()


def test_a_shard_that_refuses_the_last_block_delays_nothing(tiny_model, rig, mortal, submit, greedy):
    """The engine has room for few tails: the next request runs when the move has failed."""
    cluster = rig(tiny_model, shards=1, memory_bytes=64 << 20, wrap=mortal)
    cluster.resize(3 * stride_bytes(cluster.attention.layouts[0].block_bytes))
    engine = cluster.start()
    (shard,) = (cluster.clients[worker] for worker in cluster.targets)
    refused = threading.Event()

    def refuse():
        refused.set()
        raise Full("no room", free_bytes=0)

    # The prompt is written by 3 layers; the end's hand-off is the next to write.
    shard.before("write", 4, refuse)
    first = submit(engine, "first", prompt_of(256), answer(257))
    assert isinstance(first.result(), Finished) and len(first.tokens) == 257
    second = submit(engine, "second", prompt_of(300, 1), answer(20))
    assert isinstance(second.result(), Finished) and refused.is_set()
    assert second.tokens == greedy(prompt_of(300, 1), 20)
