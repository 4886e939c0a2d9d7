"""``farshore bench cluster --only loop``: the real loop over workers without processes."""

from farshore.benchmarks import machine
from farshore.benchmarks.cluster import benchmark


def test_the_loop_replaces_what_is_lost():
    sizes = benchmark.Sizes(fake_workers=40, fake_rounds=12)
    report = benchmark.run(machine.facts(1), sizes, only="loop", progress=lambda _: None)
    (bar,) = report.bars
    assert bar.name == "round_p99" and bar.value > 0
    assert len(report.results[0].timing.samples_s) == 12
