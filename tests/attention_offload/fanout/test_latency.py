"""Tests of latency records: the quantiles of the histogram, slow shards, and deadlines."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farshore.attention_offload.base import AttentionModel
from farshore.attention_offload.fanout.fanout import Fanout
from farshore.attention_offload.fanout.latency import (
    DEADLINE_LEAST_FRAMES,
    LEAST_S,
    RECENT_FRAMES,
    SLOW_LEAST_FRAMES,
    STEPS_AN_OCTAVE,
    WINDOW_FRAMES,
    Histogram,
    LinkRecord,
    SlowShards,
    bucket,
    frame_deadline_s,
    links,
)
from farshore.attention_offload.transport.frames import Transport

BUCKET = 2 ** (1 / STEPS_AN_OCTAVE)


@given(st.lists(st.floats(LEAST_S, 100.0), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_is_right_to_within_its_bucket(samples, share):
    histogram = Histogram()
    for sample in samples:
        histogram.add(bucket(sample))
    exact = sorted(samples)[max(0, -int(-share * len(samples) // 1) - 1)]
    assert exact * (1 - 1e-9) <= histogram.quantile_s(share) <= exact * BUCKET * (1 + 1e-9)


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 1e6])
def test_a_latency_outside_the_range_counts_in_the_nearest_bucket(seconds):
    histogram = Histogram()
    histogram.add(bucket(seconds))
    assert histogram.quantile_s(0.5) > 0


def test_old_latencies_are_forgotten():
    histogram = Histogram()
    assert histogram.quantile_s(0.5) == 0.0
    for seconds in (1.0, 1e-3, 1e-3):
        for _ in range(WINDOW_FRAMES):
            histogram.add(bucket(seconds))
    assert histogram.quantile_s(0.99) < 2e-3
    assert histogram.count == 3 * WINDOW_FRAMES


def record_of(ms, frames=SLOW_LEAST_FRAMES, work=1):
    """The record of a shard that answered ``frames`` frames in ``ms`` each."""
    record = LinkRecord(frames=frames)
    record.expect(work)
    answer(record, ms, frames)
    return record


def answer(record, ms, frames):
    for _ in range(frames):
        record.answered(ms / 1e3)


def slow(records):
    return {link.worker_id for link in links(records, dict.fromkeys(records, Transport.TCP)) if link.slow}


def test_a_shard_is_slow_compared_with_the_others():
    records = {
        "a": record_of(1),
        "b": record_of(1.1),
        "c": record_of(9),
        "new": record_of(9, frames=3),
        "unused": LinkRecord(),
    }
    found = {link.worker_id: link for link in links(records, dict.fromkeys(records, Transport.TCP))}
    assert slow(records) == {"c"}
    assert "unused" not in found
    assert found["c"].transport == Transport.TCP and 9 <= found["c"].p50_ms <= 9 * BUCKET


def test_a_shard_that_has_more_to_do_is_not_slow():
    assert slow({"a": record_of(1, work=100), "b": record_of(9, work=800)}) == set()
    assert slow({"a": record_of(1, work=800), "b": record_of(9, work=100)}) == {"b"}


def test_a_shard_is_slow_compared_with_its_own_past():
    record = record_of(1, frames=WINDOW_FRAMES)
    answer(record, 9, 2 * RECENT_FRAMES)
    assert slow({"a": record}) == {"a"}
    answer(record, 1, 2 * RECENT_FRAMES)
    assert slow({"a": record}) == set()


def test_a_shard_that_got_more_to_do_is_not_slow():
    record = record_of(1, frames=WINDOW_FRAMES)
    for _ in range(32):
        record.expect(9)
    answer(record, 7, 2 * RECENT_FRAMES)
    assert slow({"a": record}) == set()


def test_a_difference_between_two_transports_does_not_make_a_shard_slow():
    assert slow({"a": record_of(0.01), "b": record_of(0.1)}) == set()


def test_one_shard_alone_is_not_slow_and_a_failure_shows():
    failed = LinkRecord(failures=2)
    (alone,) = links({"a": record_of(100)}, {"a": Transport.TCP})
    assert not alone.slow
    found = links({"a": record_of(100), "b": failed}, {"a": Transport.TCP, "b": Transport.GRPC})
    assert [(link.worker_id, link.failures, link.slow) for link in found] == [
        ("a", 0, False),
        ("b", 2, False),
    ]


# -- deadlines ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "expected_ms", "deadline_ms"),
    [
        (0, 0.0, 1000),
        (999, 0.02, 1000),
        (1000, 0.0, 100),
        (1000, 0.02, 100.08),
        (1000, 5, 120),
        (5000, 75, 400),
        (5000, 225, 1000),
        (5000, 5000, 1000),
    ],
)
def test_a_deadline_is_100_ms_and_4_times_what_is_expected_and_1_s_at_most(frames, expected_ms, deadline_ms):
    assert frame_deadline_s(frames, expected_ms / 1e3) == pytest.approx(deadline_ms / 1e3)


def steady(ms, frames):
    """The record of ``frames`` frames that took ``ms`` each, in a step whose frames ask for work 1."""
    record = LinkRecord()
    for done in range(0, frames, 100):
        record.expect(1)
        answer(record, ms, 100)
        record.frames = done + 100
    record.expect(1)
    return record


def test_the_deadline_follows_the_median_once_enough_frames_were_seen():
    assert steady(10, DEADLINE_LEAST_FRAMES - 100).deadline_s == 1.0
    assert 0.14 <= steady(10, DEADLINE_LEAST_FRAMES).deadline_s <= 0.1 + 0.04 * BUCKET


@pytest.mark.parametrize(("work", "times"), [(1, 1), (5, 5), (0.1, 1), (100, 100)])
def test_the_deadline_grows_with_the_work_of_a_frame(work, times):
    record = steady(10, DEADLINE_LEAST_FRAMES)
    above_least_s = record.deadline_s - 0.1
    record.expect(work)
    assert record.deadline_s == pytest.approx(min(0.1 + times * above_least_s, 1.0))
    record.expect(1)
    assert record.deadline_s == pytest.approx(0.1 + above_least_s, rel=0.01)


def test_the_deadline_forgets_old_latencies():
    record = steady(100, DEADLINE_LEAST_FRAMES)
    assert record.deadline_s >= 0.5
    for _ in range(2 * WINDOW_FRAMES // 100 + 3):
        answer(record, 1, 100)
        record.frames += 100
        record.expect(1)
    assert record.deadline_s <= 0.11


def test_a_link_reports_the_current_deadline():
    (link,) = links({"a": steady(10, DEADLINE_LEAST_FRAMES)}, {"a": Transport.TCP})
    assert 140 <= link.deadline_ms <= 100 + 40 * BUCKET


def test_the_log_says_once_that_a_shard_is_slow_and_once_that_it_is_not(caplog):
    caplog.set_level("INFO")
    slow_shards, record = SlowShards(), record_of(1, frames=WINDOW_FRAMES)
    for ms in (1, 9, 9, 1, 1):
        answer(record, ms, 2 * RECENT_FRAMES)
        slow_shards.look(links({"a": record}, {"a": Transport.TCP}))
    assert [(entry.levelname, entry.getMessage().split(":")[0]) for entry in caplog.records] == [
        ("WARNING", "attention worker a is slow"),
        ("INFO", "attention worker a is as fast as before"),
    ]


def test_status_shows_both_transports_if_hot_frames_and_kv_use_different_ones():
    transports = {
        "a": (Transport.SHARED_MEMORY, Transport.SHARED_MEMORY),
        "b": (Transport.SHARED_MEMORY, Transport.GRPC),
        "c": (Transport.TCP, None),
        "d": (None, Transport.TCP),
    }
    clients = {
        worker: SimpleNamespace(transport=hot, bulk_transport=bulk)
        for worker, (hot, bulk) in transports.items()
    }
    fanout = Fanout(clients, AttentionModel(specs=(), layer_class=(), layouts=()))
    for record in fanout._records.values():
        record.failures = 1
    assert [link.transport for link in fanout.links()] == [
        "shared memory",
        "shared memory, KV over gRPC",
        "TCP",
        "",
    ]
