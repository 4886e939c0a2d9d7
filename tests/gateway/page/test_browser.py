"""The page in a real browser: what it draws, with names that try to be markup, in light and dark."""

import re

import pytest

from farshore.proto import admin_pb2 as admin

pytestmark = pytest.mark.heavy

MIB, GIB = 1 << 20, 1 << 30
HOSTILE = "<img src=x onerror=alert(1)>"
GROUND = {"light": (0xF5, 0xF6, 0xF8), "dark": (0x11, 0x15, 0x1C)}
SCHEMES = {"light": 1, "dark": 0}
"""The browser's numbers."""


def attention(name, host, *, free, cached=0, step=0, **fields):
    return admin.WorkerStatus(
        worker_id=name,
        kind=admin.WORKER_KIND_ATTENTION,
        host=host,
        state=fields.pop("state", admin.WORKER_STATE_READY),
        budget_bytes=4 * GIB,
        free_bytes=free,
        cached_bytes=cached,
        attended_bytes=step * 700 * MIB,
        **fields,
    )


def spans(*places, groups=(0, 3)):
    """Spans of (worker, first, last)."""
    return [
        admin.SpanStatus(
            worker_id=worker, first=first, last=last, group0=groups[0], group1=groups[1], bytes=9 * MIB
        )
        for worker, first, last in places
    ]


def cluster(step):
    """The ``step``-th status of a cluster of two nodes."""
    links = [
        admin.ShardLink(worker_id="attention-0-a1f3", transport="shared memory", p99_ms=0.42),
        admin.ShardLink(worker_id="attention-2-9bc0", transport="TCP", p99_ms=3.9, slow=True, failures=2),
    ]
    dense = admin.WorkerStatus(
        worker_id="dense-0-77aa",
        kind=admin.WORKER_KIND_DENSE,
        host="node-a",
        state=admin.WORKER_STATE_READY,
        budget_bytes=2 * GIB,
        free_bytes=1900 * MIB,
        running=3,
        waiting=1,
        tokens=5000 + 40 * step,
        links=links,
    )
    by_heads = [
        span
        for group in range(3)
        for span in spans(
            (f"attention-{group}-{('a1f3', '5d20', '9bc0')[group]}", 0, 12_288), groups=(group, group + 1)
        )
    ]
    sequences = [
        admin.SequenceStatus(
            sequence_id="0f3a9c",
            owner="dense-0-77aa",
            tokens=24_900,
            tail_first=24_064,
            spans=spans(
                ("attention-0-a1f3", 0, 8192),
                ("attention-1-5d20", 8192, 16_384),
                ("attention-2-9bc0", 16_384, 24_064),
            ),
        ),
        admin.SequenceStatus(
            sequence_id="77b0d1", owner="dense-0-77aa", tokens=12_800, tail_first=12_288, spans=by_heads
        ),
        admin.SequenceStatus(sequence_id="c01d5e/1", owner="dense-0-77aa", tokens=300),
        admin.SequenceStatus(
            sequence_id="9e44d0",
            owner="dense-0-77aa",
            tail_first=6144,
            spans=spans(("attention-1-5d20", 0, 6144)),
        ),
    ]
    return admin.ClusterStatusResponse(
        model="smollm2",
        dtype="bfloat16",
        kv_format="int8",
        version="0.1.0",
        placement="offload",
        workers=[
            dense,
            attention("attention-0-a1f3", "node-a", free=3 * GIB, cached=700 * MIB, step=step),
            attention(
                "attention-1-5d20",
                HOSTILE,
                free=2 * GIB,
                cached=GIB,
                step=step,
            ),
            attention("attention-2-9bc0", HOSTILE, free=GIB, step=step, state=admin.WORKER_STATE_DRAINING),
            admin.WorkerStatus(
                worker_id="attention-3-1e1e",
                kind=admin.WORKER_KIND_ATTENTION,
                state=admin.WORKER_STATE_UNREACHABLE,
            ),
            admin.WorkerStatus(
                worker_id="attention-4-0f0f",
                kind=admin.WORKER_KIND_ATTENTION,
                state=admin.WORKER_STATE_FAILED,
                failure="huge pages: 0 of 512 are free",
            ),
        ],
        sequences=sequences,
        pool_budget_bytes=12 * GIB,
        pool_free_bytes=6 * GIB,
    )


@pytest.fixture
def busy(controller):
    """A controller of a busy cluster."""
    controller.statuses = [cluster(step) for step in range(100)]
    kinds = [
        ("joined", "attention-2-9bc0", ""),
        ("draining", "attention-2-9bc0", HOSTILE),
        ("lost", "attention-3-1e1e", "no heartbeat for 10 s"),
    ]
    controller.events = [
        admin.ClusterEvent(number=number, unix_s=1.8e9 + number, kind=kind, subject=subject, detail=detail)
        for number, (kind, subject, detail) in enumerate(kinds, 1)
    ]
    return controller


def test_the_page_draws_the_cluster(url, busy, browse):
    document, log = browse(url, polls=4)
    assert "CONSOLE" not in log, log
    assert busy.asked > 2
    assert re.search(r'<span id="rate">\d+\.\d</span>', document)
    assert "smollm2 · bfloat16, KV as int8 · version 0.1.0" in document and "live" in document
    assert document.count('class="node"') == 3 and "unknown node" in document
    assert document.count("<article") == 6 + 4
    assert 'title="attention-1-5d20: tokens 8,192 to 16,384, groups 0 to 3, 9.0 MiB"' in document
    assert 'title="attention-2-9bc0: tokens 0 to 12,288, groups 2 to 3, 9.0 MiB"' in document
    assert 'title="dense-0-77aa: the tail, tokens 24,064 to 24,900"' in document
    assert "a prompt of 6,144 tokens or more, being computed" in document
    assert "1.0 GiB held, 700 MiB cached, 2.3 GiB free" in document
    assert "huge pages: 0 of 512 are free" in document
    assert "slower than the others · 2 late or lost answers" in document
    assert document.index("no heartbeat for 10 s") < document.index("joined")


def test_names_are_text(url, busy, browse):
    document, _ = browse(url)
    assert document.count("&lt;img src=x onerror=alert(1)&gt;") == 2
    assert "<img" not in document


def test_the_picture_stays_when_the_controller_is_away(url, busy, browse, unavailable):
    busy.statuses = [*busy.statuses[:2], unavailable]
    document, _ = browse(url, polls=6)
    assert re.search(r'<p id="problem" role="alert">No status: .*no directory', document)
    assert re.search(r'<p id="age">as it was \d seconds ago', document) and '<body class="stale">' in document
    assert document.count("<article") == 6 + 4


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [1280, 360])
def test_light_and_dark_wide_and_narrow(url, busy, browse, corner, tmp_path, scheme, width):
    picture = tmp_path / f"{scheme}-{width}.png"
    browse(
        url,
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
        f"--window-size={width},1400",
        f"--screenshot={picture}",
    )
    assert corner(picture) == GROUND[scheme]
