"""Priority orders the requests that wait for their first placement, and nothing else."""

import queue

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farshore.ids import SequenceId
from farshore.sampling import Sampling
from farshore.workers.engine.admission import EngineLimits
from farshore.workers.engine.requests import Requests
from farshore.workers.engine.sequence import Failed, Finished, Sampled, Sequence

from ..hold.endless import ENDLESS
from ..hold.paused import Paused, at_tokens

SHORT = Sampling(max_tokens=2)


def prompt_of(length, seed=0):
    return torch.randint(97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture
def tell():
    """tell(engine, name, prompt, sampling, priority): submits a request, whose events go to ``tell.news`` as
    (name, event). Returns a Paused; ``pause_at``: numbers of the tokens at which the engine stands still."""

    def submit(engine, name, prompt, sampling, priority=0, *, pause_at=()):
        emit = Paused(lambda event: submit.news.put((name, event)), at_tokens(*pause_at))
        engine.submit(SequenceId(name), prompt, sampling, emit, epoch=1, priority=priority)
        return emit

    submit.news = queue.SimpleQueue()
    return submit


def await_event(news, kind, name=None):
    """The name of the next request with an event of this kind."""
    while True:
        found, event = news.get(timeout=60)
        assert not isinstance(event, Failed), event.error
        if isinstance(event, kind) and name in (None, found):
            return found


def test_lower_numbers_are_admitted_first_then_earlier_arrivals(tiny_model, rig, tell):
    engine = rig(tiny_model, memory_bytes=64 << 20).start(limits=EngineLimits(running=1))
    tell(engine, "running", prompt_of(30), ENDLESS, priority=9)
    await_event(tell.news, Sampled)
    for name, priority in (("late", 5), ("first", -1), ("none", 0), ("second", -1), ("last", 2**31 - 1)):
        tell(engine, name, prompt_of(20), SHORT, priority)
    engine.cancel(SequenceId("running"))
    ends = [await_event(tell.news, Finished) for _ in range(6)]
    assert ends == ["running", "first", "second", "none", "late", "last"]


def test_an_urgent_small_request_passes_a_large_one_that_finds_no_room(tiny_model, rig, tell):
    """Memory for six blocks: three are for the one that runs, and the large one asks for four and a spare.
    Nothing is given back before the small one has ended."""
    layout = rig(tiny_model).attention.layouts[0]
    engine = rig(tiny_model, shards=1, memory_bytes=layout.block_bytes * 6).start()
    running = tell(engine, "running", prompt_of(300), Sampling(max_tokens=400), pause_at=[1, 31])
    with running:
        tell(engine, "large", prompt_of(760, 1), SHORT)
    with running:  # The large one has been refused in the rounds between.
        tell(engine, "urgent", prompt_of(20, 2), SHORT, priority=-1)
    assert [await_event(tell.news, Finished) for _ in range(3)] == ["urgent", "running", "large"]


def sequence(order, *, priority=0, admitted=None, choice=0):
    made = Sequence(
        id=SequenceId(f"{order}"),
        epoch=1,
        order=order,
        priority=priority,
        prompt_tokens=1,
        tokens=[1],
        sampling=SHORT,
        emit=lambda event: None,
        arrived_s=0.0,
        fingerprint=b"",
        choice=choice,
    )
    if admitted is not None:
        made.admitted, made.queued_s = admitted, 0.0
    return made


def turns(requests):
    """The waiting sequences in the order in which they are placed."""
    found = []
    while (first := requests.first_waiting()) is not None:
        requests.mark_placed(first)
        first.queued_s = 0.0
        found.append(first)
    return found


@given(
    new=st.lists(st.integers(-3, 3), max_size=8),
    parked=st.sets(st.tuples(st.integers(1, 5), st.integers(0, 2)), max_size=8),
    priority=st.integers(-3, 3),
)
def test_what_was_parked_continues_before_anything_begins(new, parked, priority):
    """Whatever the priorities: first what ran, in the order of admission, then the others."""
    requests = Requests(100)
    ran = [sequence(99, priority=priority, admitted=a, choice=c) for a, c in parked]
    fresh = [sequence(order, priority=p) for order, p in enumerate(new)]
    for one in fresh:
        requests.add(one)
    for one in ran:
        requests.park(one)
    found = turns(requests)
    assert found[: len(ran)] == sorted(ran, key=lambda one: (one.admitted, one.choice))
    assert found[len(ran) :] == sorted(fresh, key=lambda one: (one.priority, one.order))
    assert [one.admitted for one in found[len(ran) :]] == list(range(1, len(fresh) + 1))
