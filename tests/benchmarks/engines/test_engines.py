"""``farshore bench engines``: the parts that need nothing but this machine, with tiny sizes."""

import pytest
import torch

from farshore.benchmarks.catalogue import BENCHMARKS, Options
from farshore.benchmarks.engines import benchmark, pairs
from farshore.benchmarks.engines.setting import Sizes
from farshore.errors import InvalidRequest
from farshore.model_spec import ModelSpec


def run(only, progress=lambda _: None):
    return BENCHMARKS["engines"].run(Options(only=only), progress)


@pytest.fixture
def small(tmp_path):
    """Sizes with a model of a few thousand weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    shape = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=8, vocab_size=97)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048)
    LlamaForCausalLM(LlamaConfig(**shape, **heads)).save_pretrained(tmp_path / "model")
    return Sizes(
        spec=ModelSpec(model=str(tmp_path / "model")),
        vocab=97,
        rounds=1,
        pair_sequences=2,
        pair_tokens=4,
        prefix_tokens=512,
        fairness_frames=50,
        fairness_tokens=4,
    )


def test_routing_reports_a_bar_for_long_and_short_prompts(monkeypatch):
    monkeypatch.setattr("farshore.benchmarks.engines.routing.CHOICES", 200)
    told = []
    report = run("routing", told.append)
    assert told == ["routing"]
    assert len(report.results) == len(report.bars) == 2
    assert all(bar.value > 0 for bar in report.bars)


def test_an_unknown_part_is_refused_by_the_names_of_all():
    with pytest.raises(InvalidRequest, match="redis; routing; pairs; prefix; fairness; drain"):
        run("nothing")


def test_pairs_need_a_core_each(monkeypatch):
    monkeypatch.setattr(pairs, "usable_cores", lambda: [0])
    (bar,) = run("pairs").bars
    assert bar.value is None and not bar.met and "need 2" in bar.note


@pytest.mark.heavy
def test_engines_on_a_core_each_answer_together(small):
    report = benchmark.run(Options().facts(), small, only="pairs", progress=lambda _: None)
    alone, together = report.results
    assert (alone.figures["tokens"], together.figures["tokens"]) == (8, 16)
    assert report.bars[0].value > 0


@pytest.mark.heavy
def test_another_engine_finds_the_prefix(small):
    report = benchmark.run(Options().facts(), small, only="prefix", progress=lambda _: None)
    assert report.results[1].figures == {"cached_tokens": 512, "prompt_tokens": 528}
    assert report.bars[0].value > 0


@pytest.mark.heavy
def test_frames_are_measured_beside_each_load_at_both_shards(small):
    report = benchmark.run(Options().facts(), small, only="fairness", progress=lambda _: None)
    assert len(report.results) == 7 and not report.bars
    assert all(len(result.timing.samples_s) == 50 for result in report.results)
    assert sum("p99_over_another_shard" in result.figures for result in report.results) == 3
