"""``farshore top``: the screen of a real terminal, text, JSON, and the figures."""

import dataclasses
import json
import os
import re
import signal

import grpc
import pytest

from farshore.client import events
from farshore.client.cli.operators.view import Sample, render, snapshot

DENSE, ATTENTION = "WORKER_KIND_DENSE", "WORKER_KIND_ATTENTION"
READY, FAILED = "WORKER_STATE_READY", "WORKER_STATE_FAILED"
ENTER, LEAVE = "\x1b[?1049h", "\x1b[?1049l"


def worker(worker_id, kind, **fields):
    zeros = {field.name: 0 for field in dataclasses.fields(events.Worker)}
    texts = dict(worker_id=worker_id, kind=kind, address="", host="", state="ready", links=())
    return events.Worker(**(zeros | texts | fields))


def status(*workers):
    zeros = {field.name: 0 for field in dataclasses.fields(events.ClusterStatus)}
    known = dict(
        model="m", version="1", workers=workers, sequences=(), pool_budget_bytes=4, pool_free_bytes=1
    )
    return events.ClusterStatus(**(zeros | known))


def test_rates_are_of_the_time_between_two_statuses():
    before = Sample(
        status(
            worker("dense-0-a", "dense", tokens=100),
            worker("dense-1-a", "dense", tokens=7),
            worker("dense-2-a", "dense", tokens=9),
            worker("attention-0-a", "attention", attended_bytes=1000),
        ),
        at_s=10.0,
    )
    after = Sample(
        status(
            worker("dense-0-a", "dense", tokens=150, running=2, waiting=1),
            worker("dense-1-b", "dense", tokens=70, parked=3),
            worker("dense-2-a", "dense", state="unreachable"),
            worker("attention-0-a", "attention", attended_bytes=6000),
        ),
        at_s=12.5,
    )
    first = snapshot(before, None, unix_s=1.0)
    assert first.tokens_per_s is None and {each.attended_bytes_per_s for each in first.workers} == {None}
    now = snapshot(after, before, unix_s=2.0)
    # A replaced worker has another id, one that is away no counters.
    assert [each.tokens_per_s for each in now.workers] == [20.0, None, None, None]
    assert now.workers[3].attended_bytes_per_s == 2000.0
    assert (now.tokens_per_s, now.running, now.waiting, now.parked) == (20.0, 2, 1, 3)
    texts = [line.text for line in render(now)]
    assert texts[1].split() == ["pool", "[###############", "]", "3", "B", "of", "4", "B"]
    assert "2 running, 1 waiting, 3 parked" in texts[2] and "20.0/s" in texts[3]


@pytest.fixture
def busy(farshore):
    """A Harness whose status shows a dense worker, a slow attention worker and a sequence."""
    now = farshore.engine.status
    now.pool_budget_bytes, now.pool_free_bytes = 1 << 30, 3 << 28
    dense = now.workers.add(
        worker_id="dense-0", kind=DENSE, state=READY, running=2, waiting=1, parked=1, tokens=50
    )
    dense.links.add(
        worker_id="attention-0", transport="TCP", frames=9, p50_ms=0.25, p99_ms=3, slow=True, failures=1
    )
    now.workers.add(worker_id="attention-0", kind=ATTENTION, state=FAILED, budget_bytes=1 << 30)
    now.sequences.add(sequence_id="abc", owner="dense-0")
    return farshore


def test_json(run, busy):
    done = run("top", "--server", busy.address, "--json", "--count", "2", "--interval", "0.01")
    assert (done.code, done.err) == (0, "")
    first, second = map(json.loads, done.out.splitlines())
    assert first["tokens_per_s"] is None and second["tokens_per_s"] == 0.0
    assert second["unix_s"] > first["unix_s"]
    keys = ["unix_s", "model", "version", "pool_budget_bytes", "pool_free_bytes", "sequences", "running"]
    assert list(first) == [*keys, "waiting", "parked", "tokens_per_s", "workers"]
    assert (first["sequences"], first["running"], first["waiting"], first["parked"]) == (1, 2, 1, 1)
    dense, attention = first["workers"]
    assert list(dense) == [
        *("worker_id", "kind", "state", "budget_bytes", "free_bytes", "running", "waiting", "parked"),
        *("tokens_per_s", "attended_bytes_per_s", "links"),
    ]
    assert dense["links"][0]["p99_ms"] == 3 and attention["links"] == []


def test_text_is_plain_and_one_snapshot_after_the_other(process, busy):
    done = process("top", "--server", busy.address, "--count", "2", "--interval", "0.01")
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode()
    assert "\x1b" not in text and text.count("SHARD LATENCY") == 2
    assert re.search(r"^pool       \[#####               \] 256\.0 MiB of 1\.0 GiB$", text, re.MULTILINE)
    assert ["dense-0", ">", "attention-0", "TCP", "0.25", "ms", "3", "ms", "1", "slow"] in [
        line.split() for line in text.splitlines()
    ]


def test_text_ends_with_the_error(run, farshore):
    farshore.engine.status = (grpc.StatusCode.UNAVAILABLE, "no directory")
    done = run("top", "--server", farshore.address)
    assert done.code == 3 and "no directory" in done.err and done.out == ""


@pytest.fixture
def screen(terminal, busy):
    """A TerminalProcess that has drawn the first snapshot, and draws the next in an hour."""
    started = terminal("top", "--server", busy.address, "--interval", "3600")
    started.expect(ENTER)
    assert "\x1b[31mattention-0" in started.expect("q ends")
    return started


def test_q_gives_the_terminal_back(screen):
    assert screen.settings_now != screen.settings
    screen.send("xq")
    code, rest = screen.end()
    assert (code, screen.settings_now) == (0, screen.settings)
    assert rest.endswith(f"\x1b[?25h{LEAVE}")


@pytest.mark.parametrize("ending", ["\x03", signal.SIGTERM])
def test_a_signal_gives_the_terminal_back(screen, ending):
    if ending == "\x03":
        screen.send(ending)
    else:
        screen.process.send_signal(ending)
    code, rest = screen.end()
    assert (code, screen.settings_now) == (0, screen.settings)
    assert rest.endswith(f"\x1b[?25h{LEAVE}")


def test_a_smaller_terminal_shows_less(screen):
    screen.resize(rows=5, columns=20)
    frame = screen.expect("more lines)")
    assert "SHARD" not in frame
    shown = [
        re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line).strip()
        for line in frame.rpartition("\x1b[H")[2].split("\n")
    ]
    assert all(len(line) <= 20 for line in shown) and shown[1].startswith("pool")


def test_ctrl_z_gives_the_terminal_back_until_it_goes_on(screen):
    screen.send("\x1a")
    assert os.waitid(os.P_PID, screen.process.pid, os.WSTOPPED | os.WNOWAIT).si_status == signal.SIGSTOP
    screen.expect(LEAVE)
    assert screen.settings_now == screen.settings
    screen.process.send_signal(signal.SIGCONT)
    screen.expect(ENTER)
    screen.expect("q ends")
    screen.send("q")
    assert screen.end()[0] == 0 and screen.settings_now == screen.settings


def test_a_status_that_does_not_come_leaves_the_last_one(terminal, busy):
    screen = terminal("top", "--server", busy.address, "--interval", "0.05", NO_COLOR="1")
    screen.expect("dense-0")
    shown, busy.engine.status = busy.engine.status, (grpc.StatusCode.UNAVAILABLE, "no directory")
    screen.expect("no directory")
    frame = screen.expect("q ends")
    assert "dense-0" in frame and "\x1b[31m" not in frame
    busy.engine.status = shown
    while "no directory" in screen.expect("q ends"):
        pass
    screen.send("q")
    assert screen.end()[0] == 0
