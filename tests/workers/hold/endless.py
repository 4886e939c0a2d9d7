"""Sequences that run until a test ends them, so that nothing a test waits for can be slower than they are."""

from farshore.ids import SequenceId
from farshore.sampling import Sampling
from farshore.workers.engine.sequence import Finished, Reason

ENDLESS = Sampling(max_tokens=6000)
"""More tokens than any test waits for."""


def end(engine, name, collected, *, choices=1):
    """Cancels a running sequence. Its ``choices`` must all have run until now; their tokens are collected."""
    engine.cancel(SequenceId(name))
    for _ in range(choices):
        event = collected.result()
        assert isinstance(event, Finished) and event.reason is Reason.CANCELLED, event


def end_greedy(engine, name, collected, prompt, is_greedy):
    """Cancels a running sequence of one choice, and checks all its tokens."""
    end(engine, name, collected)
    assert is_greedy(prompt, collected.tokens, len(collected.tokens))
