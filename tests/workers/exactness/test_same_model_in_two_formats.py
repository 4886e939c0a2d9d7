"""The demo model gives the same tokens from its GGUF file as from safetensors by transformers."""

import pytest
import torch

from farshore.models.chat.prompts import ChatPrompts, Conversation
from farshore.models.files.source import resolve
from farshore.models.tokenizer.load import load_tokenizer
from farshore.models.weights.load import load_model
from farshore.sampling import Sampling
from farshore.workers.engine.sequence import Finished

QUESTIONS = ["What is the capital of France?", "Write a haiku about  the sea,\n\tin Français: 東京, 1234567!"]
GREEDY = Sampling(max_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def converted(demo_source, hugging_face, tmp_path_factory):
    """The folder that transformers saves after loading the GGUF file."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("converted")
    hugging_face(torch.float32).save_pretrained(folder)
    place, file = demo_source.path.parent, demo_source.path.name
    AutoTokenizer.from_pretrained(place, gguf_file=file).save_pretrained(folder)
    return folder


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_tokens(demo_source, converted, rig, submit, dtype):
    answers = []
    for source in (demo_source, resolve(str(converted))):
        tokenizer, model = load_tokenizer(source), load_model(source, dtype=dtype)
        engine = rig(model, shards=1).start()
        chat = ChatPrompts(tokenizer)
        conversations = [Conversation(messages=[{"role": "user", "content": q}]) for q in QUESTIONS]
        prompts = [chat.encode(conversation, most_chars=1 << 20) for conversation in conversations]
        chat.close()
        prompts += [tokenizer.encode(question) for question in QUESTIONS]
        requests = [submit(engine, str(number), prompt, GREEDY) for number, prompt in enumerate(prompts)]
        assert all(isinstance(request.result(), Finished) for request in requests)
        answers.append((prompts, [request.tokens for request in requests]))
    assert answers[0] == answers[1]
    assert len({tuple(tokens) for tokens in answers[0][1]}) == len(prompts)
