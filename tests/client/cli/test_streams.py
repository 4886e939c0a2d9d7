"""Commands as processes: encodings of the locale, pipes, closed streams, what must not reach a terminal."""

import os
import signal
import socket
import subprocess
import sys

import pytest

WILD = "a\x1b]0;title\x07b\u202ec\x85d → 🌍"
LOCALES = [
    {"LC_ALL": "C"},
    {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    {"PYTHONIOENCODING": "ascii"},
]


@pytest.fixture
def wild(farshore, served):
    """A Harness whose engine answers WILD, and whose status has it, too."""
    farshore.engine.auto = served.tokenizer.encode(WILD)
    worker = farshore.engine.status.workers.add(worker_id="dense-0", kind="WORKER_KIND_DENSE")
    worker.links.add(worker_id=WILD)
    return farshore


@pytest.mark.parametrize("variables", LOCALES)
def test_no_locale_makes_a_command_fail(process, wild, variables):
    question = "Größe?".encode()
    for arguments in (("generate", "-", "--raw"), ("chat",), ("status",)):
        done = process(*arguments, "--server", wild.address, stdin=question, **variables)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
        assert b"a\x1b]0;title" in done.stdout


def test_what_is_piped_in_is_utf_8(process, wild, served):
    process(
        "generate", "-", "--raw", "--server", wild.address, stdin="Größe?".encode(), PYTHONIOENCODING="ascii"
    )
    prompt = wild.engine.next_sequence().request.prompt
    assert list(prompt) == served.tokenizer.encode("Größe?")
    done = process("generate", "-", "--server", wild.address, stdin=b"\xff\xfe")
    assert done.returncode == 1 and b"not UTF-8 text" in done.stderr


def test_an_answer_reaches_a_pipe_as_it_is(process, wild):
    done = process("generate", "Hi", "--server", wild.address)
    assert done.stdout.decode() == f"{WILD}\n"


@pytest.mark.parametrize("arguments", [("generate", "Hi"), ("status",)])
def test_an_answer_cannot_command_a_terminal(terminal, wild, arguments):
    shown = terminal(*arguments, "--server", wild.address)
    code, text = shown.end()
    assert code == 0 and r"a\x1b]0;title\x07b\u202ec\x85d → 🌍" in text
    assert "\x1b]" not in text and "\u202e" not in text


def test_progress_is_off_with_no_color(terminal, farshore, served):
    shown = terminal("generate", "Hi", "--server", farshore.address, NO_COLOR="1")
    sequence = farshore.engine.next_sequence()
    sequence.prefill(1, 2)
    sequence.tokens(*served.tokenizer.encode("Good."))
    sequence.finish()
    assert shown.end() == (0, "Good.\r\n")


def test_streams_that_are_closed(wild):
    command = f'exec "$0" -P -m farshore.client.cli.main generate - --server {wild.address}'
    for closed in ("<&-", "</dev/null >&-", "</dev/null 2>&-"):
        done = subprocess.run(
            ["bash", "-c", f"{command} {closed}", sys.executable],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout
    done = subprocess.run(
        ["bash", "-c", f"{command} <<< Hi >&-", sys.executable], capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_reader_that_goes_away(wild):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-P", "-m", "farshore.client.cli.main"]
    done = subprocess.run(
        [*command, "status", "--server", wild.address], stdout=write, stderr=subprocess.PIPE, timeout=60
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_answer_with_130(terminal, farshore, number):
    shown = terminal("generate", "Hi", "--server", farshore.address)
    sequence = farshore.engine.next_sequence()
    shown.process.send_signal(number)
    code, text = shown.end()
    assert code == 130 and "Traceback" not in text
    assert sequence.ended.wait(30)


def test_a_time_limit_ends_an_answer_with_3(run, farshore, monkeypatch):
    # The limit is for the answer here; a busy machine may need longer to find the gateway.
    monkeypatch.setattr("farshore.client.cli.connect.await_gateway", lambda *_, **__: True)
    done = run("generate", "Hi", "--server", farshore.address, "--timeout", "0.05")
    assert done.code == 3 and "--timeout S gives it more time" in done.err


def test_a_time_limit_ends_the_wait_for_a_gateway_with_3(run):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        done = run("status", "--server", address, "--timeout", "0.05")
    assert done.code == 3 and "within 0.05 s" in done.err
