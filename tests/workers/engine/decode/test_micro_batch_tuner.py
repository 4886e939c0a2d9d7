"""The number of micro-batches follows the measured times of steps."""

import time
from collections import Counter
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.attention_offload.fanout.fanout import Fanout
from farshore.attention_offload.transport.frames import Transport
from farshore.benchmarks.offload.rig import StepRig, delayed
from farshore.ids import WorkerId
from farshore.workers.engine.attention_model import attention_model
from farshore.workers.engine.decode.micro_batch_tuner import (
    BETTER,
    MOST_MICRO_BATCHES,
    TRIAL_EVERY_STEPS,
    TRIAL_STEPS,
    MicroBatchTuner,
)

LAYERS = 30


class Machine:
    """Simulated steps that take max(n·d, n·a, d + a + RTT) per layer, on a simulated clock."""

    def __init__(self, *, weights_ms, row_ms, attention_ms, rtt_ms, **options):
        self.weights_ms, self.row_ms, self.attention_ms, self.rtt_ms = (
            weights_ms,
            row_ms,
            attention_ms,
            rtt_ms,
        )
        self.now_s = self.waited_s = 0.0
        self.ran = []
        self.tuner = MicroBatchTuner(lambda: self.waited_s, clock=lambda: self.now_s, **options)

    def layer_ms(self, rows, n):
        d = self.weights_ms + self.row_ms * rows / n
        a = self.attention_ms / n
        return max(n * d, n * a, d + a + self.rtt_ms)

    def run(self, rows, steps=8 * (TRIAL_EVERY_STEPS + TRIAL_STEPS)):
        """Runs ``steps`` steps; returns the number of micro-batches that most of the last ones had."""
        self.ran.clear()
        for _ in range(steps):
            with self.tuner.step(rows) as n:
                layer_ms = self.layer_ms(rows, n)
                busy_ms = n * self.weights_ms + self.row_ms * rows
                self.now_s += LAYERS * layer_ms / 1e3
                self.waited_s += LAYERS * (layer_ms - busy_ms) / 1e3
                self.ran.append(n)
        last = self.ran[-TRIAL_EVERY_STEPS:]
        return max(set(last), key=last.count)

    def best(self, rows):
        return min((1, 2, 4, 8), key=lambda n: self.layer_ms(rows, n))


@pytest.mark.parametrize(
    ("machine", "rows", "expected"),
    [
        (Machine(weights_ms=0.4, row_ms=0.1, attention_ms=8, rtt_ms=2), 16, 2),
        (Machine(weights_ms=0.1, row_ms=0.1, attention_ms=2, rtt_ms=8), 16, 8),
        (Machine(weights_ms=0.4, row_ms=0.1, attention_ms=1, rtt_ms=3), 16, 4),
        (Machine(weights_ms=3, row_ms=0.01, attention_ms=1, rtt_ms=1), 16, 1),
        (Machine(weights_ms=1, row_ms=0.1, attention_ms=0, rtt_ms=0), 16, 1),
        (Machine(weights_ms=0.1, row_ms=0.1, attention_ms=2, rtt_ms=8), 1, 1),
    ],
)
def test_the_tuner_settles_on_the_fastest_number(machine, rows, expected):
    assert rows == 1 or machine.best(rows) == expected
    assert machine.run(rows) == expected


def test_the_tuner_follows_the_round_trip_up_and_down():
    machine = Machine(weights_ms=1.2, row_ms=0.1, attention_ms=1, rtt_ms=0)
    for machine.rtt_ms, expected in ((0, 1), (6, 4), (0, 1), (3, 2)):
        assert machine.best(16) == machine.run(16) == expected


def test_without_waiting_no_other_number_is_tried():
    machine = Machine(weights_ms=1, row_ms=0.1, attention_ms=0, rtt_ms=0)
    machine.run(16)
    assert set(machine.ran) == {1}


@pytest.mark.parametrize(("rows", "row_ms", "most"), [(64, 1, MOST_MICRO_BATCHES), (3, 30, 3)])
def test_the_number_is_bounded_by_the_rows_and_a_constant(rows, row_ms, most):
    machine = Machine(weights_ms=0.001, row_ms=row_ms, attention_ms=0.1, rtt_ms=100)
    assert machine.run(rows) == max(machine.ran) == most


def test_a_device_tries_no_more_than_it_can_run():
    machine = Machine(weights_ms=0.1, row_ms=0.1, attention_ms=2, rtt_ms=8, most=2)
    assert machine.run(16) == max(machine.ran) == 2


def test_steps_that_capture_graphs_do_not_count():
    """On a device the first two steps of each number take longer, whatever it gains."""
    machine = Machine(weights_ms=0.4, row_ms=0.1, attention_ms=8, rtt_ms=2, warm_up_steps=2)
    warm, runs = machine.layer_ms, Counter()

    def layer_ms(rows, n):
        runs[n] += 1
        return warm(rows, n) + 500 * (runs[n] <= 2)

    machine.layer_ms = layer_ms
    machine.run(16, steps=2 * (2 + TRIAL_STEPS))
    assert runs == {1: 5, 2: 5}
    with machine.tuner.step(16) as n:
        machine.now_s += 1
    assert n == 2


def test_a_step_that_fails_does_not_count():
    machine = Machine(weights_ms=0.4, row_ms=0.1, attention_ms=8, rtt_ms=2)
    assert machine.run(16) == 2
    for _ in range(2 * TRIAL_EVERY_STEPS):
        with pytest.raises(KeyError), machine.tuner.step(16) as n:
            machine.now_s += 1e-9 if n == 1 else 1.0
            raise KeyError
    assert machine.run(16, steps=1) == 2


@settings(max_examples=40, deadline=None)
@given(
    weights_ms=st.floats(0.01, 5),
    row_ms=st.floats(0, 1),
    attention_ms=st.floats(0, 20),
    rtt_ms=st.floats(0, 20),
    rows=st.sampled_from([1, 2, 3, 8, 16, 64]),
)
def test_the_tuner_settles_near_the_best_number_for_any_times(rows, **times_ms):
    """The tuner may miss a doubling that gains less than ``BETTER`` or that ``WORTH_HIDING`` rules out,
    and the doublings after it."""
    machine = Machine(**times_ms)
    chosen = machine.run(rows)
    tried = [n for n in (1, 2, 4, 8) if n <= rows] or [1]
    assert machine.layer_ms(rows, chosen) <= 1.15 * min(machine.layer_ms(rows, n) for n in tried)


@pytest.mark.heavy
@pytest.mark.parametrize("delay_s", [0.0, 0.004])
def test_over_a_real_delay_the_tuner_decides_by_the_measured_times(
    tiny_model, start_process, connect, delay_s
):
    """Steps over a real shard behind a proxy: each trial's outcome follows from its measured times."""
    attention = attention_model(tiny_model.config, tiny_model.dtype)
    worker, process = WorkerId("shard"), start_process()
    transports = [Transport.TCP]
    with delayed(process.address, attention, tiny_model.dtype, delay_s) as far:
        store = connect(process.address, model=attention).store
        rig = StepRig(tiny_model, attention, {worker: store}, sequences=8, context_tokens=600)
        client = connect(far, model=attention, transports=transports)
        client.connect()
        shards = Fanout({worker: client}, attention)
        clock = []

        def now_s():
            clock.append(time.perf_counter())
            return clock[-1]

        tuner, ran = MicroBatchTuner(lambda: shards.waited_s, clock=now_s), []
        for _ in range(12 * TRIAL_STEPS):
            with tuner.step(8) as n:
                rig.step(shards, micro_batches=n)
            ran.append(n)
    seconds = [end - start for start, end in zip(clock[::2], clock[1::2], strict=True)]
    assert 2 in ran, "nearly all of a step is waiting: more micro-batches are tried"
    settled, step = 1, 0
    while step + TRIAL_STEPS < len(ran):
        if ran[step] == settled:
            step += 1
            continue
        trial, before = (
            ran[step],
            [s for n, s in zip(ran[:step], seconds[:step], strict=True) if n == settled],
        )
        assert ran[step : step + TRIAL_STEPS] == [trial] * TRIAL_STEPS
        measured = seconds[step : step + TRIAL_STEPS]
        if median(measured) < BETTER * median(before[-TRIAL_STEPS:]):
            settled = trial
        step += TRIAL_STEPS
        assert ran[step] == settled
