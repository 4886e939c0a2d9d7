"""``farshore bench engines``: the parts that need nothing but this machine."""

import pytest

from farshore.benchmarks.catalogue import BENCHMARKS, Options
from farshore.errors import InvalidRequest


def run(only, progress):
    return BENCHMARKS["engines"].run(Options(only=only), progress)


def test_routing_reports_a_bar_for_long_and_short_prompts(monkeypatch):
    monkeypatch.setattr("farshore.benchmarks.engines.routing.CHOICES", 200)
    told = []
    report = run("routing", told.append)
    assert told == ["routing"]
    assert len(report.results) == len(report.bars) == 2
    assert all(bar.value > 0 for bar in report.bars)


def test_an_unknown_part_is_refused_by_the_names_of_all():
    with pytest.raises(InvalidRequest, match="redis; routing; drain"):
        run("nothing", lambda _: None)
