"""The number of micro-batches follows what a layer takes, by the clock alone."""

import pytest

from farshore.workers.stagger import MOST_MICRO_BATCHES, TRIAL_EVERY_STEPS, TRIAL_STEPS, Stagger

LAYERS = 30


class Machine:
    """Steps that take max(n·d, n·a, d + a + RTT) a layer, in a time of its own."""

    def __init__(self, *, weights_ms, row_ms, attention_ms, rtt_ms):
        self.weights_ms, self.row_ms, self.attention_ms, self.rtt_ms = (
            weights_ms,
            row_ms,
            attention_ms,
            rtt_ms,
        )
        self.now_s = self.waited_s = 0.0
        self.ran = []
        self.stagger = Stagger(lambda: self.waited_s, clock=lambda: self.now_s)

    def layer_ms(self, rows, n):
        d = self.weights_ms + self.row_ms * rows / n
        a = self.attention_ms / n
        return max(n * d, n * a, d + a + self.rtt_ms)

    def run(self, rows, steps=8 * (TRIAL_EVERY_STEPS + TRIAL_STEPS)):
        """The number that most of the last steps ran with."""
        self.ran.clear()
        for _ in range(steps):
            with self.stagger.step(rows) as n:
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
def test_it_settles_on_the_fastest(machine, rows, expected):
    assert rows == 1 or machine.best(rows) == expected
    assert machine.run(rows) == expected


def test_it_follows_the_network_up_and_down():
    machine = Machine(weights_ms=1.2, row_ms=0.1, attention_ms=1, rtt_ms=0)
    for machine.rtt_ms, expected in ((0, 1), (6, 4), (0, 1), (3, 2)):
        assert machine.best(16) == machine.run(16) == expected


def test_where_nothing_is_waited_for_nothing_is_tried():
    machine = Machine(weights_ms=1, row_ms=0.1, attention_ms=0, rtt_ms=0)
    machine.run(16)
    assert set(machine.ran) == {1}


@pytest.mark.parametrize(("rows", "row_ms", "most"), [(64, 1, MOST_MICRO_BATCHES), (3, 30, 3)])
def test_no_more_of_them_than_rows_and_a_bound(rows, row_ms, most):
    machine = Machine(weights_ms=0.001, row_ms=row_ms, attention_ms=0.1, rtt_ms=100)
    assert machine.run(rows) == max(machine.ran) == most


def test_a_step_that_fails_does_not_count():
    machine = Machine(weights_ms=0.4, row_ms=0.1, attention_ms=8, rtt_ms=2)
    assert machine.run(16) == 2
    for _ in range(2 * TRIAL_EVERY_STEPS):
        with pytest.raises(KeyError), machine.stagger.step(16) as n:
            machine.now_s += 1e-9 if n == 1 else 1.0
            raise KeyError
    assert machine.run(16, steps=1) == 2
