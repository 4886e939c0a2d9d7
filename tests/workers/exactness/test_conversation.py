"""A chat of two turns: the second finds the KV of the first answer, which decode steps computed."""

import pytest
import torch

from farshore.sampling import Sampling
from farshore.workers.engine.sequence import Finished

NEW_TOKENS = 16


@pytest.mark.heavy
def test_a_second_turn_finds_the_first_answer(
    demo_model, rig, submit, encode_chat, tokenizer, hugging_face, hugging_face_greedy
):
    question = {"role": "user", "content": "Write a long story about a lighthouse keeper and a storm."}
    prompt = encode_chat([question])
    cluster = rig(demo_model(torch.float32), shards=2, memory_bytes=256 << 20)
    engine = cluster.start()
    first = submit(engine, "first", prompt, Sampling(max_tokens=300, temperature=0.0))
    assert isinstance(first.result(), Finished) and first.tokens
    cluster.settle()
    answer = {"role": "assistant", "content": tokenizer.decode(first.tokens)}
    conversation = encode_chat([question, answer, {"role": "user", "content": "What was his name?"}])
    full = (len(prompt) + len(first.tokens) - 1) // 256 * 256
    assert conversation[:full] == [*prompt, *first.tokens][:full] and full > len(prompt)
    second = submit(engine, "second", conversation, Sampling(max_tokens=NEW_TOKENS, temperature=0.0))
    assert second.result().cached_tokens == full
    assert second.tokens == hugging_face_greedy(hugging_face(torch.float32), conversation, NEW_TOKENS)
