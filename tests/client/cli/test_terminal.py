"""The text that a terminal is shown, and when signals take effect."""

import io
import os
import signal

import pytest

from farshore.client.cli.terminal import (
    Interrupted,
    Progress,
    decorated,
    held_signals,
    interrupts,
    printable,
    styled,
    table,
    write,
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Größe\t東京\n🌍\u200f", "Größe\t東京\n🌍\u200f"),
        ("a\r\nb\rc", "a\nb\\x0dc"),
        ("\x1b[2J\x07\x00\x7f", "\\x1b[2J\\x07\\x00\\x7f"),
        ("\x85\x9b31m", "\\x85\\x9b31m"),
        ("\u202e\u2066\u2069", "\\u202e\\u2066\\u2069"),
    ],
)
def test_characters_that_command_a_terminal(text, shown):
    assert printable(text) == shown
    terminal, pipe = Terminal(), io.StringIO()
    write(text, terminal)
    write(text, pipe)
    assert (terminal.getvalue(), pipe.getvalue()) == (shown, text)
    Progress(pipe).note(text)
    assert pipe.getvalue() == f"{text}{shown}\n"


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    assert decorated(Terminal()) and styled("a", "bold", Terminal()) == "\x1b[1ma\x1b[0m"
    assert styled("a", "", Terminal()) == styled("a", "red", io.StringIO()) == "a"
    monkeypatch.setenv("NO_COLOR", "")
    assert decorated(Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not decorated(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not decorated(Terminal())


def test_tables_align_numbers_to_the_right():
    assert table(("NAME", "N"), [("a", 5), ("bcdef", 10)]) == ["NAME    N", "a       5", "bcdef  10"]
    assert table(("NAME",), []) == ["NAME"]


def test_every_interrupt_is_raised():
    before = signal.getsignal(signal.SIGINT)
    with interrupts():
        for _ in range(2):
            with pytest.raises(Interrupted):
                os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_held_signals_take_effect_at_the_end():
    done = False
    with interrupts(), pytest.raises(Interrupted), held_signals():
        os.kill(os.getpid(), signal.SIGINT)
        done = True
    assert done
