"""The histogram's quantiles, and who counts as slow."""

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
def test_what_is_off_the_scale_counts_at_its_end(seconds):
    histogram = Histogram()
    histogram.add(bucket(seconds))
    assert histogram.quantile_s(0.5) > 0


def test_what_was_slow_long_ago_is_forgotten():
    histogram = Histogram()
    assert histogram.quantile_s(0.5) == 0.0
    for seconds in (1.0, 1e-3, 1e-3):
        for _ in range(WINDOW_FRAMES):
            histogram.add(bucket(seconds))
    assert histogram.quantile_s(0.99) < 2e-3
    assert histogram.count == 3 * WINDOW_FRAMES


def record(ms, frames=SLOW_LEAST_FRAMES, work=1):
    it = LinkRecord(frames=frames)
    it.expect(work)
    answer(it, ms, frames)
    return it


def answer(it, ms, frames):
    for _ in range(frames):
        it.answered(ms / 1e3)


def slow(records):
    found = links(records, dict.fromkeys(records, Transport.TCP))
    return {it.worker_id for it in found if it.slow}


def test_a_shard_is_slow_beside_the_others():
    records = {
        "a": record(1),
        "b": record(1.1),
        "c": record(9),
        "new": record(9, frames=3),
        "unused": LinkRecord(),
    }
    found = {it.worker_id: it for it in links(records, dict.fromkeys(records, Transport.TCP))}
    assert slow(records) == {"c"}
    assert "unused" not in found
    assert found["c"].transport == Transport.TCP and 9 <= found["c"].p50_ms <= 9 * BUCKET


def test_a_shard_that_has_more_to_do_is_not_slow():
    assert slow({"a": record(1, work=100), "b": record(9, work=800)}) == set()
    assert slow({"a": record(1, work=800), "b": record(9, work=100)}) == {"b"}


def test_a_shard_is_slow_beside_its_own_past():
    it = record(1, frames=WINDOW_FRAMES)
    answer(it, 9, 2 * RECENT_FRAMES)
    assert slow({"a": it}) == {"a"}
    answer(it, 1, 2 * RECENT_FRAMES)
    assert slow({"a": it}) == set()


def test_a_shard_that_got_more_to_do_is_not_slow():
    it = record(1, frames=WINDOW_FRAMES)
    for _ in range(32):
        it.expect(9)
    answer(it, 7, 2 * RECENT_FRAMES)
    assert slow({"a": it}) == set()


def test_what_a_hop_takes_more_by_one_transport_than_by_another_is_not_slow():
    assert slow({"a": record(0.01), "b": record(0.1)}) == set()


def test_one_shard_alone_is_not_slow_and_a_failure_shows():
    failed = LinkRecord(failures=2)
    (alone,) = links({"a": record(100)}, {"a": Transport.TCP})
    assert not alone.slow
    found = links({"a": record(100), "b": failed}, {"a": Transport.TCP, "b": Transport.GRPC})
    assert [(it.worker_id, it.failures, it.slow) for it in found] == [("a", 0, False), ("b", 2, False)]


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
    """A record whose every frame took as long, and a step that asks for work 1."""
    it = LinkRecord()
    for done in range(0, frames, 100):
        it.expect(1)
        answer(it, ms, 100)
        it.frames = done + 100
    it.expect(1)
    return it


def test_the_deadline_follows_the_median_once_enough_frames_were_seen():
    assert steady(10, DEADLINE_LEAST_FRAMES - 100).deadline_s == 1.0
    assert 0.14 <= steady(10, DEADLINE_LEAST_FRAMES).deadline_s <= 0.1 + 0.04 * BUCKET


@pytest.mark.parametrize(("work", "times"), [(1, 1), (5, 5), (0.1, 1), (100, 100)])
def test_the_deadline_is_scaled_by_what_a_frame_asks_more_than_those_before(work, times):
    it = steady(10, DEADLINE_LEAST_FRAMES)
    at_once_s = it.deadline_s - 0.1
    it.expect(work)
    assert it.deadline_s == pytest.approx(min(0.1 + times * at_once_s, 1.0))
    it.expect(1)
    assert it.deadline_s == pytest.approx(0.1 + at_once_s, rel=0.01)


def test_the_deadline_forgets_what_was_slow_long_ago():
    it = steady(100, DEADLINE_LEAST_FRAMES)
    assert it.deadline_s >= 0.5
    for _ in range(2 * WINDOW_FRAMES // 100 + 3):
        answer(it, 1, 100)
        it.frames += 100
        it.expect(1)
    assert it.deadline_s <= 0.11


def test_a_link_tells_the_deadline_in_force():
    (found,) = links({"a": steady(10, DEADLINE_LEAST_FRAMES)}, {"a": Transport.TCP})
    assert 140 <= found.deadline_ms <= 100 + 40 * BUCKET


def test_the_log_says_once_that_a_shard_is_slow_and_once_that_it_is_not(caplog):
    caplog.set_level("INFO")
    watch, it = SlowShards(), record(1, frames=WINDOW_FRAMES)
    for ms in (1, 9, 9, 1, 1):
        answer(it, ms, 2 * RECENT_FRAMES)
        watch.look(links({"a": it}, {"a": Transport.TCP}))
    assert [(r.levelname, r.getMessage().split(":")[0]) for r in caplog.records] == [
        ("WARNING", "attention worker a is slow"),
        ("INFO", "attention worker a is as fast as before"),
    ]


def test_status_names_both_ways_where_kv_goes_by_another():
    ways = {
        "a": (Transport.SHARED_MEMORY, Transport.SHARED_MEMORY),
        "b": (Transport.SHARED_MEMORY, Transport.GRPC),
        "c": (Transport.TCP, None),
        "d": (None, Transport.TCP),
    }
    clients = {w: SimpleNamespace(transport=it[0], bulk_transport=it[1]) for w, it in ways.items()}
    fanout = Fanout(clients, AttentionModel(specs=(), layer_class=(), layouts=()))
    for record in fanout._records.values():
        record.failures = 1
    assert [it.transport for it in fanout.links()] == [
        "shared memory",
        "shared memory, KV over gRPC",
        "TCP",
        "",
    ]
