"""Contexts beyond the model's own positions, against transformers: every kind of scaling on a tiny model, and
YaRN over 24,000 tokens of the demo model."""

import copy

import pytest
import torch

from farshore.models.config.load import load_config
from farshore.models.files.source import resolve
from farshore.models.weights.load import load_model
from farshore.sampling import Sampling
from farshore.workers.engine.sequence import Finished

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
MAX_MODEL_LEN = 32_768
LEAST_TOKENS = 24_000
ANSWER = " 7391."
NEEDLE = f"The secret number of lighthouse Aurora is{ANSWER}"
NEW_TOKENS = 24
CHUNK_TOKENS = 2048
"""Tokens of a forward pass of transformers: bounds the memory of its attention."""


@pytest.fixture(scope="module")
def prompt(tokenizer):
    """LEAST_TOKENS or more with the needle at a third of their length; its beginning is their end."""
    days = [
        f"On day {n} the keeper of lighthouse number {n * 7 % 101} wrote: the wind came from the"
        f" {('north', 'east', 'south', 'west')[n % 4]}, {n * 13 % 50} ships passed, and the lamp burned"
        f" {('well', 'low', 'not at all')[n % 3]}."
        for n in range(700)
    ]
    days.insert(len(days) // 3, NEEDLE)
    ids = tokenizer.encode(" ".join([*days, NEEDLE.removesuffix(ANSWER)]))
    assert LEAST_TOKENS <= len(ids) <= MAX_MODEL_LEN - NEW_TOKENS, len(ids)
    return ids


@pytest.fixture(scope="module")
def scaled_hugging_face(demo_source):
    """transformers' model in float32 with the same scaling in its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    where = dict(gguf_file=demo_source.path.name)
    config = AutoConfig.from_pretrained(demo_source.path.parent, **where)
    config.max_position_embeddings = MAX_MODEL_LEN
    config.rope_parameters = YARN | {"rope_theta": config.rope_parameters["rope_theta"]}
    model = AutoModelForCausalLM.from_pretrained(
        demo_source.path.parent,
        config=config,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        **where,
    )
    assert model.model.rotary_emb.rope_type == "yarn"
    return model.eval()


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_needle_beyond_the_original_positions(
    demo_source, scaled_hugging_face, hugging_face_greedy, rig, submit, prompt, tokenizer, capsys
):
    config = load_config(demo_source, max_model_len=MAX_MODEL_LEN, rope_scaling=YARN)
    assert config.max_positions == MAX_MODEL_LEN
    model = load_model(demo_source, dtype=torch.float32, config=config)
    cluster = rig(model, shards=2, memory_bytes=4 << 30)
    engine = cluster.start()
    sampling = Sampling(max_tokens=NEW_TOKENS, temperature=0.0)
    collected = submit(engine, "needle", prompt, sampling)
    assert isinstance(collected.result(), Finished)
    expected = hugging_face_greedy(scaled_hugging_face, prompt, NEW_TOKENS, prefill_chunk_size=CHUNK_TOKENS)
    with capsys.disabled():
        print(f"\n{len(prompt)} tokens, YaRN: {tokenizer.decode(collected.tokens)!r}")
    assert collected.tokens == expected


TINY_LENGTH = 600
TINY_SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 5.0},
    "dynamic": {"rope_type": "dynamic", "factor": 5.0},
    "yarn": {"rope_type": "yarn", "factor": 5.0, "original_max_position_embeddings": 128},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.0, 1.1, 1.2],
        "long_factor": [1.0, 2.0, 4.0, 6.0],
        "factor": 5.0,
        "original_max_position_embeddings": 128,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 5.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


@pytest.mark.parametrize("kind", TINY_SCALINGS)
def test_engine_at_the_full_scaled_length(tiny, tmp_path, rig, submit, kind):
    """A model of 128 positions is served to 600. transformers computes the whole sequence at once, so that
    its angles are those of a sequence of 600 tokens in the kinds that depend on the length."""
    from transformers import LlamaForCausalLM

    config = copy.deepcopy(tiny.config)
    config.max_position_embeddings = 128
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(tiny.state_dict())
    plain.save_pretrained(tmp_path)
    source = resolve(str(tmp_path))
    served = load_config(source, max_model_len=TINY_LENGTH, rope_scaling=TINY_SCALINGS[kind])
    engine = rig(load_model(source, dtype=torch.float32, config=served)).start()
    prompt = torch.randint(97, (TINY_LENGTH - 20,), generator=torch.Generator().manual_seed(1)).tolist()
    collected = submit(engine, kind, prompt, Sampling(max_tokens=20, temperature=0.0))
    assert isinstance(collected.result(), Finished)

    config.rope_parameters = TINY_SCALINGS[kind] | {"rope_theta": 10000.0}
    theirs = LlamaForCausalLM(config).eval()
    theirs.load_state_dict(tiny.state_dict())
    with torch.inference_mode():
        logits = theirs(torch.tensor([prompt + collected.tokens]), use_cache=False).logits[0]
    assert collected.tokens == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
