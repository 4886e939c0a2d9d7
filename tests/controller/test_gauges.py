"""The workers' gauges, without Ray's own metrics."""

import threading

import pytest

from farshore.controller import gauges
from farshore.controller.gauges import Gauges, Sample
from farshore.periodic import PeriodicThread


class Gauge:
    """Stands for Ray's, which answers no question about its value."""

    def __init__(self, values, name):
        self.values, self.name = values, name

    def set(self, value, tags):
        self.values[self.name, tags["worker"], tags["shard"]] = value


@pytest.fixture
def values(monkeypatch):
    monkeypatch.setattr(gauges, "PERIOD_S", 0.001)
    values, threads = {}, []
    monkeypatch.setattr(gauges, "Gauge", lambda name, **_: Gauge(values, name))

    def thread(*arguments, **named):
        threads.append(PeriodicThread(*arguments, **named))
        return threads[-1]

    monkeypatch.setattr(gauges, "PeriodicThread", thread)
    yield values
    for each in threads:
        each.stop()


def test_gauges_outlive_a_sample_that_fails(values, caplog):
    failing, sampled = iter(range(3)), threading.Event()

    def sample():
        if next(failing, None) is not None:
            raise KeyError("dreaming")
        yield Sample("farshore_tokens", 7)
        yield Sample("farshore_shard_failures", 1, "attention-0-a")
        sampled.set()

    Gauges("dense-0", sample)
    assert sampled.wait(60)
    assert values == {
        ("farshore_tokens", "dense-0", ""): 7,
        ("farshore_shard_failures", "dense-0", "attention-0-a"): 1,
    }
    assert [entry.message for entry in caplog.records] == ["the worker's gauges can't be sampled"]
