"""Events are numbered, kept, and copied to the directory."""

from farshore.controller.events import Events
from farshore.errors import TransportError


def test_a_restarted_controller_continues_the_earlier_events():
    first = Events()
    for subject in ("a", "b"):
        first.add("started", subject)
    second = Events(first.since(0))
    second.add("joined", "c")
    assert [(event.number, event.subject) for event in second.since(1)] == [(2, "b"), (3, "c")]


def test_events_that_could_not_be_published_follow_later():
    published, away = [], True

    def publish(event):
        if away:
            raise TransportError("redis does not answer")
        published.append(event)

    earlier = Events()
    earlier.add("started", "a")
    events = Events(earlier.since(0), publish=publish)
    for subject in ("b", "c"):
        events.add("lost", subject)
    assert [event.subject for event in events.since(0)] == ["a", "b", "c"] and not published
    away = False
    events.add("joined", "d")
    assert published == events.since(1)
