"""Options and wrong usage. No test here starts a cluster or calls a gateway."""

import re

import pytest

from farshore import __version__


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("dance",),
        ("generate",),
        ("generate", "Hi", "--max-tokens", "0"),
        ("generate", "Hi", "--max-tokens", "many"),
        ("generate", "Hi", "--temperature", "3"),
        ("generate", "Hi", "--temperature", "nan"),
        ("generate", "Hi", "--top-p", "0"),
        ("generate", "Hi", "--seed", "-1"),
        ("generate", "Hi", "--top-k", "-1"),
        ("generate", "Hi", "--min-p", "1.5"),
        ("generate", "Hi", "--repetition-penalty", "0"),
        ("generate", "Hi", "--repetition-penalty", "101"),
        ("generate", "Hi", "--presence-penalty", "nan"),
        ("generate", "Hi", "--frequency-penalty", "3"),
        ("generate", "Hi", "--logit-bias", "42"),
        ("generate", "Hi", "--logit-bias", "42=200"),
        ("generate", "Hi", "--logit-bias", "-1=2"),
        ("generate", "Hi", "--logprobs", "-1", "--json"),
        ("generate", "Hi", "--logprobs", "1"),
        ("generate", "Hi", "--n", "0"),
        ("generate", "Hi", "--n", "2", "--temperature", "0"),
        ("generate", "Hi", "--stop-token-id", "x"),
        ("generate", "Hi", "--regex", "a", "--choice", "a"),
        ("generate", "Hi", "--placement", "moon"),
        ("generate", "Hi", "--server", "localhost"),
        ("generate", "Hi", "--server", "::1:50051"),
        ("generate", "Hi", "--server", "127.0.0.1:0"),
        ("generate", "Hi", "--server", "127.0.0.1:http"),
        ("generate", "Hi", "--server", ":50051"),
        ("status", "--server", "127.0.0.1:70000"),
        ("status", "--server", "http://127.0.0.1:50051"),
        ("status", "--server", "[]:50051"),
        ("serve", "--kv-memory", "lots"),
        ("serve", "--kv-memory", "1MiB"),
        ("serve", "--attention-workers", "0"),
        ("serve", "--dense-workers", "0"),
        ("serve", "--shard-by", "colour"),
        ("serve", "--dtype", "int1"),
        ("serve", "--port", "70000"),
        ("serve", "--kv-format", "int2"),
        ("serve", "--kv-format", "float32"),
        ("serve", "--kv-format", "bf16", "--dtype", "float32"),
        ("serve", "--max-decode-stall-ms", "0"),
        ("serve", "--max-decode-stall-ms", "nan"),
        ("serve", "--speculate", "-1"),
        ("serve", "--speculate", "17"),
        ("serve", "--device", "gpu"),
        ("serve", "--device", "cuda:x"),
        ("serve", "--device", "cuda:1", "--dense-workers", "2"),
        ("serve", "--device", "cuda:1", "--attention-device", "cuda"),
        ("serve", "--device", "cuda:1", "--ray-address", "127.0.0.2:6379"),
        ("serve", "--attention-device", "cuda:1"),
    ],
)
def test_wrong_usage(run, cluster, arguments):
    done = run(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert "usage: farshore" in done.err and "error: " in done.err
    assert cluster.config is None


def test_version(run):
    assert run("--version").out == f"farshore {__version__}\n"


@pytest.mark.parametrize(
    ("word", "meant"),
    [("staus", "did you mean 'status'?"), ("xyzzy", "choose from serve, node, leave, generate")],
)
def test_an_unknown_command_suggests_the_nearest(run, word, meant):
    done = run(word, "--json")
    assert done.code == 2 and f"unknown command {word!r}: {meant}" in done.err


COMMANDS = (
    *("serve", "node", "generate", "chat", "tokenize", "detokenize", "models", "status", "top", "scale"),
    *("drain", "down", "events", "bench"),
)


def test_help_lists_every_command_and_exit_code(run):
    done = run("--help")
    listed, _, exits = done.out.partition("exit codes:")
    assert [line.split()[0] for line in exits.splitlines() if line] == ["0", "1", "2", "3", "130"]
    assert set(COMMANDS) < set(re.findall(r"^    (\w+)", listed, re.MULTILINE))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option_and_gives_an_example(run, command):
    done = run(command, "--help")
    assert done.code == 0
    assert re.search(r"^examples?:\s+(.* \| )?farshore " + command, done.out, re.MULTILINE)
    entries = re.split(r"\n  (?=-)", done.out.split("options:")[1])
    assert all(len(entry.split()) > 2 for entry in entries[1:])
