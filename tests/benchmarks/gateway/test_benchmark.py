"""The gateway benchmark, small: every process is the real one."""

import pytest

from farshore.benchmarks.gateway import benchmark as gateway
from farshore.benchmarks.gateway.setting import Sizes
from farshore.errors import InvalidRequest

SMALL = Sizes(streams=3, tokens_per_s=50.0, window_s=0.5, rounds=1, masks=20)


@pytest.mark.parametrize(
    "face", [pytest.param("grpc", marks=pytest.mark.soak), pytest.param("http", marks=pytest.mark.heavy)]
)
def test_streams(machine, face):
    report = gateway.run(machine, SMALL, only=face, progress=lambda _: None).as_dict()
    (result,) = report["results"]
    assert result["errors"] == [] and result["tokens"] > 0
    bars = {bar["name"]: bar for bar in report["bars"]}
    assert bars[f"{face}: tokens lost"]["value"] == 0
    assert bars[f"{face}: CPU of a token"]["value"] > 0 and len(bars) == 3


def test_masks(machine):
    report = gateway.run(machine, SMALL, only="masks", progress=lambda _: None).as_dict()
    results, bars = report["results"], report["bars"]
    assert [result["name"] for result in results] == [
        f"masks, {kind}" for kind in ("schema", "regex", "choice", "grammar")
    ]
    for result, bar in zip(results, bars, strict=True):
        assert bar["value"] == result["mean_us"] > 0 and result["timing"]["runs"] >= SMALL.masks


def test_unknown_part(machine):
    with pytest.raises(InvalidRequest, match="grpc; http; masks"):
        gateway.run(machine, SMALL, only="nothing", progress=lambda _: pytest.fail("measured"))
