"""Stop strings, compared with a search in the complete text, and which text is held back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.gateway.limits import Limits
from farshore.gateway.requests.stop_strings import StopStrings
from farshore.proto import inference_pb2 as api

from ...waiting import until


@given(
    st.lists(st.text("ab\n", max_size=4), max_size=12),
    st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_pieces_of_any_size_end_before_the_first_stop_string(pieces, stops):
    stream, released, pushed = StopStrings(stops), "", ""
    for piece in pieces:
        pushed += piece
        released += stream.push(piece)
        if stream.found:
            break
        assert pushed.startswith(released)
        held = pushed[len(released) :]
        assert not held or any(stop.startswith(held) for stop in stops), "held back needlessly"
    starts = [pushed.find(stop) for stop in stops if stop in pushed]
    assert stream.found == bool(starts)
    released += stream.finish()
    assert released == (pushed[: min(starts)] if starts else pushed)
    if starts:
        assert stream.push("more") == "", "nothing comes after a stop string"


def _tokens(served, text):
    return served.tokenizer.encode(text)


def test_a_stop_string_across_tokens_ends_the_answer_and_tells_the_engine(farshore, harness, served):
    call = farshore.generate(sampling=dict(stop=["nice day", "zzz"]))
    sequence = farshore.engine.next_sequence()
    ids = _tokens(served, "It is a nice day, is it not?")
    assert len(_tokens(served, " nice day")) > 1
    sequence.tokens(*ids)
    events = list(call)
    assert harness.text_of(events) == "It is a "
    done = events[-1].finished
    assert done.choices[0].reason == api.FINISH_REASON_STOP
    # Tokens up to the one that completes the stop string belong to the answer; later ones are dropped.
    kept = len(_tokens(served, "It is a nice day"))
    assert done.usage.completion_tokens == done.choices[0].tokens == kept
    assert [event.token.token_id for event in events if event.HasField("token")] == ids[:kept]
    assert done.shards[0].attended_bytes == 4096, "the engine's Finished is waited for"


def test_only_a_possible_beginning_of_a_stop_string_is_held_back(farshore, harness, served):
    call = farshore.generate(sampling=dict(stop=[" nice night"]))
    sequence = farshore.engine.next_sequence()
    next(call)
    texts = []
    for token in _tokens(served, "A nice day"):
        sequence.tokens(token)
        texts.append(next(call).token.text)
    assert texts == ["A", "", " nice day"]
    sequence.tokens(*_tokens(served, " nice"))
    assert next(call).token.text == ""
    sequence.finish()
    assert next(call).finished.choices[0].text == " nice", "the answer ended before it became a stop string"


def test_an_engine_that_ignores_the_cancel_does_not_delay_the_answer(start, harness, served):
    farshore = start(limits=Limits(cancel_s=0.1))
    farshore.engine.ignores_cancel = True
    call = farshore.generate(sampling=dict(stop=["day"]))
    sequence = farshore.engine.next_sequence()
    sequence.tokens(*_tokens(served, "A nice day"))
    done = list(call)[-1].finished
    assert done.choices[0].reason == api.FINISH_REASON_STOP
    assert sequence.ended.wait(30)


def test_a_stop_string_in_one_choice_leaves_the_others_alone(farshore, harness, served):
    call = farshore.generate(sampling=dict(stop=["day"], n=2, temperature=1.0))
    sequence = farshore.engine.next_sequence()
    sequence.tokens(*_tokens(served, "A nice day and more"), choice=0)
    sequence.tokens(*_tokens(served, "A nice night"), choice=1)
    sequence.tokens(*_tokens(served, " day"), choice=1)
    events = list(call)
    assert [harness.text_of(events, choice) for choice in (0, 1)] == ["A nice ", "A nice night "]
    assert [choice.reason for choice in events[-1].finished.choices] == [api.FINISH_REASON_STOP] * 2
    until(lambda: len(farshore.engine.cancelled) == 2)
    assert farshore.engine.cancelled == [(sequence.request.sequence_id, choice) for choice in (0, 1)]


@pytest.mark.parametrize("reason", [api.FINISH_REASON_LENGTH, api.FINISH_REASON_CANCELLED])
def test_without_a_match_the_engines_reason_stands(farshore, harness, served, reason):
    call = farshore.generate(sampling=dict(stop=["never"]))
    sequence = farshore.engine.next_sequence()
    sequence.tokens(*_tokens(served, "It never"[:-1]))
    sequence.finish(reason)
    events = list(call)
    assert harness.text_of(events) == "It neve"
    assert events[-1].finished.choices[0].reason == reason
