"""The quality benchmark: its scores equal those of transformers; its report on a tiny model is complete."""

from importlib.resources import files

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from farshore.benchmarks.quality import benchmark as quality
from farshore.benchmarks.quality.rig import SEGMENT_TOKENS, Reader
from farshore.errors import InvalidRequest
from farshore.kernels.formats import KVFormat
from farshore.models.files.source import DEMO, resolve
from farshore.models.tokenizer.load import load_tokenizer
from farshore.models.weights.load import load_model

SIZES = quality.Sizes(windows=2, window_tokens=300, haystack_tokens=200, depths=(0.2, 0.8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama with random weights and SmolLM2's vocabulary."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=8,
            vocab_size=49_152,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            initializer_range=0.3,
        )
    )
    path = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(path)
    return path


def load(folder, dtype):
    return load_model(resolve(str(folder)), dtype=dtype)


def test_scores_equal_transformers_across_segments(folder):
    tokens = torch.randint(0, 49_152, (SEGMENT_TOKENS + 90,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = LlamaForCausalLM.from_pretrained(folder).eval()(tokens[None]).logits[0, :-1]
    expected = torch.log_softmax(logits, dim=-1)
    with Reader(load(folder, torch.float32), KVFormat.FLOAT32) as reader:
        for _ in range(2):  # what the first reading stored is no shortcut for the second
            score = reader.score(tokens.tolist())
            assert torch.allclose(score.logprobs, expected.gather(1, tokens[1:, None])[:, 0], atol=2e-3)
            assert (score.best == expected.argmax(-1)).float().mean() > 0.99
        answer = reader.answer(tokens.tolist(), most_tokens=3)
    assert len(answer.tokens) == 3


def test_a_report_compares_every_format_with_bf16(folder, machine):
    tokenizer = load_tokenizer(resolve(DEMO))
    told = []

    def read(threads):
        return load(folder, torch.bfloat16), tokenizer

    report = quality.run(read, machine, SIZES, progress=told.append)
    results = {result.name: result.figures for result in report.results}
    assert (
        list(results)
        == told
        == [f"{case}, {f}" for case in ("perplexity", "needle") for f in quality.FORMATS]
    )
    bf16, int8, int4 = (results[f"perplexity, {format}"] for format in quality.FORMATS)
    assert bf16["predicted_tokens"] == 2 * 299
    assert (bf16["change_percent"], bf16["mean_logprob_distance"]) == (0.0, 0.0)
    assert 0 < int8["mean_logprob_distance"] < int4["mean_logprob_distance"]
    assert all(results[f"needle, {format}"]["of"] == 2 for format in quality.FORMATS)
    assert [bar.name for bar in report.bars] == ["perplexity, int8, change", "needle, int8, found"]


def test_bf16_is_measured_even_if_only_another_format_is_selected(folder, machine):
    def read(threads):
        return load(folder, torch.bfloat16), load_tokenizer(resolve(DEMO))

    report = quality.run(read, machine, SIZES, only="perplexity, int8", progress=lambda _: None)
    assert [result.name for result in report.results] == ["perplexity, bf16", "perplexity, int8"]
    with pytest.raises(InvalidRequest, match="choose from"):
        quality.run(read, machine, SIZES, only="int2", progress=lambda _: None)


def test_the_text_is_installed_and_long_enough_and_says_where_it_is_from():
    texts = files("farshore.benchmarks").joinpath("texts")
    tokens = load_tokenizer(resolve(DEMO)).encode(texts.joinpath("alice.txt").read_text(encoding="utf-8"))
    sizes = quality.Sizes()
    assert len(tokens) >= sizes.windows * sizes.window_tokens >= 8192
    assert "public domain" in texts.joinpath("SOURCE.md").read_text(encoding="utf-8")


def test_the_needle_is_at_the_stated_position():
    tokenizer = load_tokenizer(resolve(DEMO))
    text = "\n\n".join(f"Paragraph {i} of the hay." for i in range(200))
    for depth in (0.0, 0.3, 1.0):
        hay = quality._haystack(tokenizer, text, 1000, depth, "NEEDLE")
        before, after = hay.split("NEEDLE")
        assert len(before) / len(hay) == pytest.approx(depth, abs=0.02)
        assert 900 < len(tokenizer.encode(hay)) < 1100
        assert after or depth == 1.0
