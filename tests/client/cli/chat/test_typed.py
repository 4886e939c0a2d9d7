"""``farshore chat`` at a terminal."""

import contextlib
import signal
import subprocess

import grpc
import pytest


@pytest.fixture
def chat(terminal, farshore):
    """chat(…) -> a TerminalProcess that waits for the first question."""

    def start(*options, **variables):
        typed = terminal("chat", "--server", farshore.address, *options, **variables)
        typed.expect("/help shows")
        typed.expect("> ")
        return typed

    return start


@pytest.fixture
def prompt_of(encode_chat):
    """prompt_of("Hi", "Hello.", "And?") -> the ids of a conversation, which the user begins."""

    def ids(*turns):
        roles = ("user", "assistant")
        return encode_chat([{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)])

    return ids


def answer(farshore, served, text):
    """Sends the answer to the next question, and returns the sequence."""
    sequence = farshore.engine.next_sequence()
    sequence.tokens(*served.tokenizer.encode(text))
    sequence.finish()
    return sequence


def test_a_conversation_ends_by_ctrl_d(chat, farshore, served, prompt_of):
    typed = chat()
    typed.send("Hi\r")
    assert list(answer(farshore, served, "Hello 🌍.").request.prompt) == prompt_of("Hi")
    typed.expect("Hello 🌍.\r\n")
    typed.expect("> ")
    typed.send("And \\\rthen?\r")
    turns = ["Hi", "Hello 🌍.", "And \nthen?"]
    assert list(answer(farshore, served, "No.").request.prompt) == prompt_of(*turns)
    typed.expect("No.\r\n")
    typed.expect("> ")
    typed.send("\x1b[A\r")  # The up arrow: the line before.
    assert list(answer(farshore, served, "!").request.prompt) == prompt_of(*turns, "No.", "then?")
    typed.expect("!\r\n")
    typed.expect("> ")
    typed.send("\x04")
    assert typed.end()[0] == 0


def test_ctrl_c_ends_the_answer_and_not_the_program(chat, farshore, served, prompt_of):
    typed = chat()
    typed.send("Hi\r")
    sequence = farshore.engine.next_sequence()
    sequence.tokens(*served.tokenizer.encode("It goes"))
    typed.expect("It goes")
    typed.send("\x03")
    typed.expect("(stopped)")
    assert sequence.ended.wait(30)
    typed.expect("> ")
    typed.send("unfinished")
    typed.expect("unfinished")  # readline notices a signal once it waits for a key.
    typed.send("\x03")  # At the prompt it drops the line.
    typed.expect("> ")
    typed.send("On\r")
    assert list(answer(farshore, served, "Yes.").request.prompt) == prompt_of("Hi", "It goes", "On")
    typed.expect("Yes.\r\n")
    typed.expect("> ")
    typed.send("/quit\r")
    assert typed.end()[0] == 0


def test_ctrl_c_at_any_time(chat, farshore, served):
    """Before the first token, between tokens, while one is read."""
    typed = chat()
    for number in range(20):
        typed.send("Hi\r")
        sequence = farshore.engine.next_sequence()
        if number % 2:
            sequence.tokens(*served.tokenizer.encode("It goes"))
        if number % 4 == 3:
            typed.expect("It goes")
        typed.send("\x03")
        assert sequence.ended.wait(30)
        typed.expect("> ")
    typed.send("Hi\r")
    answer(farshore, served, "Yes.")
    typed.expect("Yes.\r\n")


def test_a_turn_that_fails_leaves_no_trace(chat, farshore, served, prompt_of):
    typed = chat()
    typed.send("Hi\r")
    # Not a lost shard: the SDK would go on with the answer by itself.
    farshore.engine.next_sequence().fail(grpc.StatusCode.INVALID_ARGUMENT, "no such thing")
    typed.expect("no such thing")
    typed.expect("> ")
    typed.send("/nothing\r")
    typed.expect("no command '/nothing'")
    typed.expect("> ")
    typed.send("Again\r")
    assert list(answer(farshore, served, "Yes.").request.prompt) == prompt_of("Again")
    typed.expect("Yes.\r\n")


def test_an_answer_cannot_command_the_terminal(chat, farshore, served):
    typed = chat()
    typed.send("Hi\r")
    answer(farshore, served, "a\x1b[2Jb\u202ec\x9bd\ne")
    typed.expect("a\\x1b[2Jb\\u202ec\\x9bd\r\ne\r\n")


def test_sigterm_ends_the_program(chat):
    typed = chat()
    while typed.process.poll() is None:  # readline misses a signal that comes before it waits for a key.
        typed.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            typed.process.wait(1)
    assert typed.end()[0] == 130


def test_characters_that_the_encoding_lacks(chat, farshore, served):
    typed = chat(PYTHONIOENCODING="ascii", LC_ALL="C")
    typed.send("Größe\r")
    typed.expect("is not ascii text")
    typed.expect("> ")
    typed.send("Hi\r")
    answer(farshore, served, "Größe")
    typed.expect("Gr\\xf6\\xdfe\r\n")


@pytest.mark.heavy
def test_ctrl_c_does_not_end_the_cluster_that_was_started(terminal):
    """A terminal sends it to every process of the foreground, Ray's too if they were there."""
    typed = terminal("chat", "--kv-memory", "64MiB", "--max-tokens", "2000", "--ignore-eos", NO_COLOR="1")
    typed.expect("/help shows", wait_s=180)
    typed.expect("> ")
    for _ in range(2):
        typed.send("Hi\r")
        typed.expect("Hi\r\n")
        typed.expect(" ")  # The answer has begun.
        typed.send("\x03")
        typed.expect("(stopped)")
        typed.expect("> ")
    typed.send("\x04")
    assert typed.end()[0] == 0
