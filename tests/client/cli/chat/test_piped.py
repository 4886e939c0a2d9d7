"""``farshore chat`` with stdin that is no terminal: one turn a line."""

import io
import json
import threading

import grpc
import pytest

from farshore.proto import inference_pb2


@pytest.fixture
def chat(run, farshore, monkeypatch):
    """chat("Hi\\n…", …) -> code, out and err."""

    def run_chat(text, *options):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        return run("chat", "--server", farshore.address, *options)

    return run_chat


@pytest.fixture
def answered(farshore, served):
    """The text with which the engine answers every question."""
    farshore.engine.auto = served.tokenizer.encode("Good.")
    return "Good."


def messages(*turns, system=None):
    roles = ("user", "assistant")
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]


def prompts(farshore):
    found = []
    while not farshore.engine.idle:
        found.append(list(farshore.engine.next_sequence().request.prompt))
    return found


def test_each_answer_knows_what_came_before(chat, farshore, answered, encode_chat):
    done = chat("One\n\nTwo\\\nlines\n//etc\nlast\\")
    assert (done.code, done.out, done.err) == (0, "Good.\n" * 4, "")
    turns = ["One", answered, "Two\nlines", answered, "/etc", answered, "last"]
    assert prompts(farshore) == [encode_chat(messages(*turns[: n + 1])) for n in (0, 2, 4, 6)]


def test_system_prompt_and_reset(chat, farshore, answered, encode_chat, tmp_path):
    (tmp_path / "system.txt").write_text("Be bräv.", encoding="utf-8")
    done = chat(
        "One\n/system Be brief.\n/system\nTwo\n/reset\nThree\n/quit\nFour\n",
        "--system",
        f"@{tmp_path / 'system.txt'}",
    )
    assert (done.code, done.out, done.err) == (0, "Good.\n" * 3, "Be brief.\n")
    assert prompts(farshore) == [
        encode_chat(messages("One", system="Be bräv.")),
        encode_chat(messages("One", answered, "Two", system="Be brief.")),
        encode_chat(messages("Three", system="Be brief.")),
    ]


def test_a_saved_conversation_is_a_chat_for_generate(chat, run, farshore, answered, encode_chat, tmp_path):
    file = tmp_path / "talk.json"
    assert chat(f"One\n/save {file}\n").code == 0
    assert json.loads(file.read_text()) == messages("One", answered)
    assert run("generate", f"@{file}", "--chat", "--server", farshore.address).code == 0
    again = chat(f"/save {file}\n")
    assert again.code == 1 and "exists: choose another name" in again.err
    assert "can't be written" in chat(f"/save {tmp_path / 'none' / 'x'}\n").err
    assert "name a file" in chat("/save\n").err


def test_help(chat):
    done = chat("/help\n")
    assert done.code == 0 and done.out == "" and "/save FILE" in done.err


def test_the_first_turn_that_fails_ends_the_command(chat, farshore, answered):
    done = chat("/sytem x\nOne\n")
    assert done.code == 1 and "no command '/sytem'" in done.err and farshore.engine.idle
    farshore.engine.refuses = (grpc.StatusCode.RESOURCE_EXHAUSTED, "queue is full")
    done = chat("One\nTwo\n")
    assert done.code == 3 and "queue is full" in done.err and done.out == ""


def test_sampling_options(chat, farshore, answered):
    done = chat("One\n", "--max-tokens", "1", "--temperature", "0.5", "--cache-salt", "ours")
    request = farshore.engine.next_sequence().request
    assert (request.sampling.max_tokens, request.sampling.temperature) == (1, 0.5)
    assert request.cache_salt == "ours"
    assert done.code == 0


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (inference_pb2.FINISH_REASON_LENGTH, "reached --max-tokens"),
        (inference_pb2.FINISH_REASON_CANCELLED, "another client cancelled"),
    ],
)
def test_an_answer_that_is_not_whole_says_so(chat, farshore, served, reason, words):
    def feed():
        sequence = farshore.engine.next_sequence()
        sequence.tokens(*served.tokenizer.encode("It is"))
        sequence.finish(reason=reason)

    feeding = threading.Thread(target=feed)
    feeding.start()
    done = chat("One\n")
    feeding.join(30)
    assert (done.code, done.out) == (0, "It is\n") and words in done.err


@pytest.mark.parametrize("options", [("--n", "2"), ("--system", "-"), ("--timeout", "0"), ("--top-p", "7")])
def test_wrong_usage(chat, options, farshore):
    assert chat("One\n", *options).code == 2 and farshore.engine.idle


def test_a_cluster_is_started_if_none_runs(run, farshore, cluster, nothing_listens, answered, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("One\n"))
    cluster.address = farshore.address
    done = run("chat", "--attention-workers", "3")
    assert (done.code, done.out) == (0, "Good.\n")
    assert cluster.config.attention_workers == 3 and cluster.stops == 1
