"""The page's JSON object: rates, bounds, and nothing that the page does not show."""

import json

import pytest

from farshore.gateway.page.view import (
    MOST_CHARS,
    MOST_SEQUENCES,
    MOST_SPANS,
    MOST_WORKERS,
    Sample,
    view,
)
from farshore.proto import admin_pb2 as admin


def shown(status, before=None, *, passed_s=2.0, events=()):
    now = Sample.of(status, 10.0 + passed_s)
    earlier = now if before is None else Sample.of(before, 10.0)
    return view(status, events, now=now, before=earlier, unix_s=1.5)


def status(*workers, **fields):
    return admin.ClusterStatusResponse(model="m", workers=workers, **fields)


def dense(name="dense-0", **fields):
    return admin.WorkerStatus(
        worker_id=name,
        kind=admin.WORKER_KIND_DENSE,
        state=fields.pop("state", admin.WORKER_STATE_READY),
        **fields,
    )


def attention(name="attention-0", **fields):
    return admin.WorkerStatus(
        worker_id=name,
        kind=admin.WORKER_KIND_ATTENTION,
        state=fields.pop("state", admin.WORKER_STATE_READY),
        **fields,
    )


def test_rates_are_of_the_time_between_two_statuses():
    before = status(dense(tokens=100), dense("dense-1", tokens=50), attention(attended_bytes=1000))
    now = shown(
        status(
            dense(tokens=150, running=2, waiting=1),
            dense("dense-1", state=admin.WORKER_STATE_UNREACHABLE),
            dense("dense-2", tokens=9, parked=3),
            attention(attended_bytes=5000),
        ),
        before,
    )
    assert [worker["tokens_per_s"] for worker in now["workers"]] == [25.0, None, None, None]
    assert [worker["attended_bytes_per_s"] for worker in now["workers"]] == [0.0, None, None, 2000.0]
    assert (now["tokens_per_s"], now["running"], now["waiting"], now["parked"]) == (25.0, 2, 1, 3)


def test_the_first_status_and_a_restarted_worker_have_no_rate():
    assert shown(status(dense(tokens=5)))["tokens_per_s"] is None
    assert shown(status(dense(tokens=5)), status(dense(tokens=6)))["tokens_per_s"] is None


@pytest.mark.parametrize(("placement", "cached"), [("local", 3), ("offload", 5)])
def test_the_pool_is_where_the_cluster_places_kv(placement, cached):
    workers = (
        dense(cached_bytes=3),
        attention(cached_bytes=5),
        attention("b", cached_bytes=7, state=admin.WORKER_STATE_DRAINING),
    )
    now = shown(status(*workers, placement=placement, pool_budget_bytes=90, pool_free_bytes=60))
    assert now["pool"] == {"budget_bytes": 90, "free_bytes": 60, "cached_bytes": cached}


def test_a_worker_shows_the_answers_of_the_engine_that_waits_longest_for_it():
    def link(p99_ms, **fields):
        return admin.ShardLink(worker_id="attention-0", p99_ms=p99_ms, **fields)

    now = shown(
        status(
            dense(links=[link(0.5, failures=1)]),
            dense("dense-1", links=[link(2.5, slow=True, failures=2)]),
            attention(),
        )
    )
    *_, worker = now["workers"]
    assert (worker["p99_ms"], worker["slow"], worker["failures"]) == (2.5, True, 3)
    assert now["workers"][0]["p99_ms"] is None


def test_too_many_are_counted():
    spans = [admin.SpanStatus(worker_id="a", first=n, last=n + 1) for n in range(MOST_SPANS + 3)]
    sequences = [
        admin.SequenceStatus(sequence_id=str(n), tokens=n % 100, spans=spans if n == 99 else ())
        for n in range(200)
    ]
    workers = [attention(str(n)) for n in range(MOST_WORKERS + 2)]
    now = shown(status(*workers, sequences=sequences))
    assert (len(now["workers"]), now["workers_left_out"]) == (MOST_WORKERS, 2)
    assert (len(now["sequences"]), now["sequences_left_out"]) == (MOST_SEQUENCES, 200 - MOST_SEQUENCES)
    assert min(sequence["tokens"] for sequence in now["sequences"]) == 100 - MOST_SEQUENCES // 2
    names = [int(sequence["sequence_id"]) for sequence in now["sequences"]]
    assert names == sorted(names)
    (cut,) = [sequence for sequence in now["sequences"] if sequence["spans_left_out"]]
    assert (cut["sequence_id"], len(cut["spans"]), cut["spans_left_out"]) == ("99", MOST_SPANS, 3)


def test_every_text_is_bounded():
    long = "x" * 100_000
    event = admin.ClusterEvent(number=1, kind=long, subject=long, detail=long)
    now = shown(
        admin.ClusterStatusResponse(
            model=long,
            dtype=long,
            kv_format=long,
            version=long,
            workers=[admin.WorkerStatus(worker_id=long, host=long)],
            sequences=[
                admin.SequenceStatus(sequence_id=long, owner=long, spans=[admin.SpanStatus(worker_id=long)])
            ],
        ),
        events=[event],
    )
    assert len(json.dumps(now)) < 20 * MOST_CHARS
    assert json.dumps(now).count("(100000 characters)") == 12


def test_numbers_that_json_has_not():
    links = [admin.ShardLink(worker_id="attention-0", p99_ms=float("inf"))]
    event = admin.ClusterEvent(number=1, unix_s=float("nan"))
    now = shown(status(dense(links=links), attention()), events=[event])
    json.dumps(now, allow_nan=False)
    assert now["workers"][1]["p99_ms"] is None


def test_a_workers_address_and_process_id_are_not_published():
    worker = dense(address="10.1.2.3:4567", process_id=76543, host="node-a")
    text = json.dumps(shown(status(worker)))
    assert "node-a" in text
    assert "10.1.2.3" not in text and "76543" not in text
