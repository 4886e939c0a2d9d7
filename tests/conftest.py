"""What the tests of several floors share: the demo model as transformers runs it, and prompts."""

import pytest
import torch

LONG_TEXT_TOKENS = 4100


@pytest.fixture(scope="session")
def demo_source():
    from farshore.models.source import resolve

    return resolve("smollm2")


@pytest.fixture(scope="session")
def tokenizer(demo_source):
    from farshore.models.tokenizer import load_tokenizer

    return load_tokenizer(demo_source)


@pytest.fixture(scope="session")
def hugging_face(demo_source):
    """(dtype, attention implementation) -> transformers' own model, loaded from the same GGUF file."""
    from transformers import AutoModelForCausalLM, GgufConfig

    loaded = {}

    def load(dtype: torch.dtype, attention: str = "sdpa"):
        if (dtype, attention) not in loaded:
            loaded[dtype, attention] = AutoModelForCausalLM.from_pretrained(
                demo_source.path.parent,
                gguf_file=demo_source.path.name,
                dtype=dtype,
                attn_implementation=attention,
                quantization_config=GgufConfig(dequantize=True),
            ).eval()
        return loaded[dtype, attention]

    return load


@pytest.fixture(scope="session")
def prompts(tokenizer):
    """24 varied prompts by name, as token ids: the correctness tests' common ground."""

    def chat(text):
        return tokenizer.encode_chat([{"role": "user", "content": text}])

    story = " ".join(
        f"On day {n} the keeper of lighthouse number {n * 7 % 101} wrote: the wind came from the"
        f" {('north', 'east', 'south', 'west')[n % 4]}, {n * 13 % 50} ships passed, and the lamp burned"
        f" {('well', 'low', 'not at all')[n % 3]}."
        for n in range(400)
    )
    story_ids = tokenizer.encode(story)
    assert len(story_ids) > LONG_TEXT_TOKENS
    return {
        "one word": tokenizer.encode("Hello"),
        "one token": tokenizer.encode("The")[:1],
        "capital": chat("What is the capital of France?"),
        "explain": chat("Explain in two sentences why the sky is blue."),
        "poem": chat("Write a short poem about the sea."),
        "sum": chat("What is 17 + 25? Answer with the number only."),
        "list": chat("Name five fruits, one on each line."),
        "translate": chat("Translate 'good morning' into French, German and Spanish."),
        "system": tokenizer.encode_chat(
            [
                {"role": "system", "content": "You are a pirate. Answer like one."},
                {"role": "user", "content": "How is the weather today?"},
            ]
        ),
        "python": tokenizer.encode("def fibonacci(n):\n    if n < 2:\n        return n\n    return"),
        "sql": tokenizer.encode("SELECT name, COUNT(*) FROM orders WHERE"),
        "html": tokenizer.encode("<html>\n<head><title>Home</title></head>\n<body>\n<h1>"),
        "json": tokenizer.encode('{"name": "Ada", "born": 1815, "languages": ['),
        "chinese": tokenizer.encode("今天天气很好，我们去"),
        "arabic": tokenizer.encode("كانت المدينة القديمة"),
        "russian": tokenizer.encode("Жили-были старик со старухой у самого синего"),
        "emoji": tokenizer.encode("🎉🎂 Happy birthday! 🥳"),
        "digits": tokenizer.encode("3.14159265358979"),
        "block minus one": story_ids[:255],
        "block": story_ids[:256],
        "block plus one": story_ids[:257],
        "two blocks": story_ids[100:612],
        "near a hand-off": story_ids[:750],
        "long": story_ids[:LONG_TEXT_TOKENS],
    }
