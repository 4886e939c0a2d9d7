"""The faults benchmark: its requests and bars, and a short run against a real server."""

import itertools
import json
import math
from collections import Counter

import pytest

from farshore.benchmarks.faults import bars as faults_bars
from farshore.benchmarks.faults import benchmark as faults
from farshore.benchmarks.faults import freeze as faults_freeze
from farshore.benchmarks.faults import oversize as faults_oversize
from farshore.benchmarks.faults import sender as faults_sender
from farshore.benchmarks.faults.hostile import HostileFindings
from farshore.benchmarks.faults.requests import HostileKind, deal
from farshore.benchmarks.faults.setting import Setting, Sizes
from farshore.benchmarks.faults.stream import ClientStream, differs, longest_gap_s, percentile
from farshore.benchmarks.report import Report
from farshore.errors import InvalidRequest, StartupError
from farshore.proto import inference_pb2 as api


def test_every_kind_occurs_a_hundred_times_in_a_full_run():
    """Every round contains each kind once, so two rounds stand for all."""
    counts = Counter(hostile.kind for hostile in deal(3, 2 * len(HostileKind)))
    assert counts == dict.fromkeys(HostileKind, 2)
    assert Sizes().requests // len(HostileKind) >= faults_bars.LEAST_OF_A_KIND


def test_the_same_seed_gives_the_same_requests_however_many():
    first = list(deal(5, 40))
    assert list(itertools.islice(deal(5, 2000), 40)) == first
    assert [hostile.message for hostile in deal(6, 40)] != [hostile.message for hostile in first]


def test_requests_are_what_their_kinds_say():
    for hostile in deal(1, 4 * len(HostileKind)):
        if hostile.kind is HostileKind.GARBAGE:
            assert not hostile.message
            continue
        request = api.GenerateRequest.FromString(hostile.message)
        assert request.request_id == hostile.request_id
        if hostile.kind is HostileKind.OVERSIZE:
            assert len(hostile.message) > 5 << 20
        elif hostile.kind in (
            HostileKind.CANCEL_AT_ONCE,
            HostileKind.CANCEL_MIDWAY,
            HostileKind.CANCEL_BEFORE,
        ):
            assert hostile.request_id and hostile.after_tokens
        elif hostile.kind is HostileKind.RESUME:
            assert api.GenerateRequest.FromString(hostile.resumed).request_id == hostile.request_id


def test_requests_include_hostile_values():
    asked = [
        api.GenerateRequest.FromString(hostile.message).sampling for hostile in deal(2, 40 * len(HostileKind))
    ]
    assert any(sampling.n == 12 for sampling in asked)
    assert any(sampling.logprobs > 49_152 for sampling in asked)
    assert any(0 < sampling.repetition_penalty < 1e-30 for sampling in asked)
    assert any(math.isnan(sampling.temperature) for sampling in asked)


@pytest.mark.parametrize(
    ("times", "gap"),
    [
        ([0, 1, 2, 3, 4, 5], 1),
        ([0, 1, 9], 8),  # The gap overlaps the range.
        ([0, 1.5], 3.5),  # No token came until the end of the range.
        ([], 3),
        ([4.5], 2.5),  # Before the first token only the time inside the range counts.
    ],
)
def test_the_longest_gap(times, gap):
    assert longest_gap_s(times, first_s=2, last_s=5) == gap


def test_where_streams_differ():
    tokens = [(0, 5), (0, 6)]
    assert differs(tokens, tokens) is None
    assert differs([(0, 5), (0, 7)], tokens) == 1
    assert differs(tokens[:1], tokens) == 1
    assert differs([*tokens, (0, 1)], tokens) == 2


def test_percentiles():
    assert percentile([], 99) is None
    assert percentile(range(1, 101), 99) == 99
    assert percentile([3.0], 99) == 3.0


def test_a_stream_is_complete_only_at_its_own_end():
    stream = ClientStream("a")
    done = api.Completion(reason=api.FINISH_REASON_CANCELLED)
    stream.take(api.GenerateEvent(finished=api.Finished(choices=[done])))
    assert stream.ended == "finished" and not stream.is_complete


def test_the_worker_to_freeze_is_the_one_whose_readers_come_closest():
    assert faults_freeze.nearest({"a": {"1"}, "b": set("1234"), "c": set("123")}, 4) == "b"
    with pytest.raises(StartupError, match="no attention worker"):
        faults_freeze.nearest({}, 4)


def test_long_prompts_are_as_long_as_asked_and_begin_differently():
    texts = [faults_oversize.long_text("Alice was beginning. " * 500, number, 30_000) for number in range(8)]
    assert {len(text) for text in texts} == {30_000} and len({text[:2000] for text in texts}) == 8


def test_oversize_messages_are_as_large_as_they_say():
    sizes = {case: make() for case, make in faults_sender.CASES.items()}
    request = api.GenerateRequest.FromString(sizes["a role of 9 MB"])
    assert len(request.chat.messages[0].role) == 9_000_000
    assert (64 << 20) - 64 <= len(sizes["64 MiB of token ids"]) <= 64 << 20
    empty = api.GenerateRequest.FromString(sizes["300,000 empty messages"])
    assert len(empty.chat.messages) == 300_000 and not any(message.role for message in empty.chat.messages)


def test_a_bar_without_a_measurement_is_missed_and_says_why():
    sizes = Sizes()
    measured = [
        faults_bars.hostile(HostileFindings(1), sizes, "the server ended", 1.0),
        faults_bars.freeze(faults_freeze.FreezeFindings(), sizes, "the server ended", 1.0),
        faults_bars.tokenize(faults_oversize.TokenizeFindings(), sizes, "the server ended", 1.0),
        faults_bars.refuse({}, "the server ended", 1.0),
    ]
    for results, bars in measured:
        told = json.loads(json.dumps(Report({}, tuple(results), tuple(bars)).as_dict(), allow_nan=False))
        assert told["bars"] and not any(bar["met"] for bar in told["bars"])
        assert all(bar["note"] == "the server ended" for bar in told["bars"])


def test_measurements_are_compared_with_the_bars():
    found = faults_freeze.FreezeFindings(
        readers=4,
        frames=1000,
        deadline_ms=180.0,
        streams=[ClientStream("0")],
        different=[],
        gap_s=0.33,
        new_first_s=2.0,
        affected_for_good=4,
        affected_ended_s=11.0,
        unclear=[],
        recovered_s=10.0,
    )
    _, bars = faults_bars.freeze(found, Sizes(), "", 1.0)
    assert all(bar.met for bar in bars)
    found.gap_s, found.readers, found.failed = 0.331, 5, ["stream 0: UNAVAILABLE"]
    _, bars = faults_bars.freeze(found, Sizes(), "", 1.0)
    assert sum(not bar.met for bar in bars) == 3


def test_a_part_that_breaks_off_says_so(monkeypatch, machine):
    async def fails(setting, found):
        raise StartupError("no memory")

    monkeypatch.setattr(faults.faults_freeze, "measure", fails)
    report = faults.run(machine, Sizes(), seed=1, only="freeze", progress=lambda _: None)
    assert report.machine["seed"] == 1
    assert {bar.note for bar in report.bars} == {"StartupError: no memory"}


def test_an_unknown_part_is_refused_before_a_server_starts(machine):
    with pytest.raises(InvalidRequest, match="no part 'dance': choose a part of hostile; freeze"):
        faults.run(machine, Sizes(), only="dance", progress=lambda _: pytest.fail("started"))


@pytest.mark.heavy
def test_sixty_hostile_requests_do_not_harm_the_bystanders(machine):
    sizes = Sizes(requests=60, concurrency=8, bystanders=2, bystander_tokens=32)
    report = faults.run(machine, sizes, seed=11, only="hostile", progress=lambda _: None)
    (result,) = report.results
    assert result.figures["ended"] == 60 and result.figures["bystander_runs"]
    bars = {bar.name: bar for bar in report.bars}
    for name in ("bystanders failed", "bystanders differ", "exits", "memory not back", "sequences left"):
        assert bars[f"hostile: {name}"].met, (bars[f"hostile: {name}"], result.figures)


def test_the_default_sizes_are_those_of_the_bars():
    setting = Setting(Sizes(), 1, lambda _: None)
    assert (setting.sizes.requests, setting.sizes.bystanders, setting.sizes.sequences) == (2000, 4, 8)
