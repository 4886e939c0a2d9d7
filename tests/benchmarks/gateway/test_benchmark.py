"""The gateway benchmark, small: every process is the real one."""

import json

import pytest

from farshore.benchmarks.gateway import benchmark as gateway_benchmark
from farshore.benchmarks.gateway.setting import Sizes
from farshore.benchmarks.gateway.streams import Found
from farshore.benchmarks.report import Report
from farshore.errors import InvalidRequest

SMALL = Sizes(streams=3, tokens_per_s=50.0, window_s=0.5, rounds=1, masks=20)


def test_the_bars_compare_each_round():
    gateway = Found(cpu_s=[3e-6, 8e-6, 2e-6], delays_s=[0.001, 0.003])
    empty = Found(cpu_s=[1e-6, 2e-6, 1e-6], delays_s=[0.001])
    (result,), bars = gateway_benchmark.measured("grpc", gateway, empty)
    assert [bar.value for bar in bars] == [0, 3.0, pytest.approx(2.0)]
    assert (result.figures["gateway_cpu_us"], result.figures["gateway_p99_ms"]) == (
        pytest.approx(3.0),
        pytest.approx(3.0),
    )


@pytest.mark.parametrize(
    ("gateway", "empty"),
    [
        (Found(cpu_s=[None]), Found(cpu_s=[None])),
        (Found(cpu_s=[None, 1e-6], delays_s=[0.1]), Found(cpu_s=[1e-6, 1e-6])),
        (Found(cpu_s=[1e-6]), Found(cpu_s=[0.0], delays_s=[0.1])),
    ],
)
def test_a_round_without_tokens_meets_no_bar(gateway, empty):
    """A window may pass without a token, on a machine that is busy with something else."""
    (result,), (lost, cpu, delay) = gateway_benchmark.measured("grpc", gateway, empty)
    assert lost.met
    for bar in (cpu, delay):
        assert (bar.value, bar.met, bar.note) == (None, False, "no token came in a window")
    json.dumps(Report({}, (result,), (lost, cpu, delay)).as_dict(), allow_nan=False)


@pytest.mark.parametrize(
    "face", [pytest.param("grpc", marks=pytest.mark.soak), pytest.param("http", marks=pytest.mark.heavy)]
)
def test_streams(machine, face):
    report = gateway_benchmark.run(machine, SMALL, only=face, progress=lambda _: None).as_dict()
    (result,) = report["results"]
    assert result["errors"] == [] and result["tokens"] > 0
    bars = {bar["name"]: bar for bar in report["bars"]}
    assert bars[f"{face}: tokens lost"]["value"] == 0
    assert bars[f"{face}: CPU of a token"]["value"] > 0 and len(bars) == 3


def test_masks(machine):
    report = gateway_benchmark.run(machine, SMALL, only="masks", progress=lambda _: None).as_dict()
    results, bars = report["results"], report["bars"]
    assert [result["name"] for result in results] == [
        f"masks, {kind}" for kind in ("schema", "regex", "choice", "grammar")
    ]
    for result, bar in zip(results, bars, strict=True):
        assert bar["value"] == result["mean_us"] > 0 and result["timing"]["runs"] >= SMALL.masks


def test_unknown_part(machine):
    with pytest.raises(InvalidRequest, match="grpc; http; masks"):
        gateway_benchmark.run(machine, SMALL, only="nothing", progress=lambda _: pytest.fail("measured"))
