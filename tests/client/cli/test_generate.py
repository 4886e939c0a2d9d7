"""``farshore generate``, with a gateway in this process and with a FakeCluster."""

import io
import json
import os
import shlex
import signal
import threading

import grpc
import pytest

from farshore.errors import StartupError
from farshore.gateway.requests.structure import grammar_of
from farshore.proto import cluster_pb2, inference_pb2


@pytest.fixture
def answer(farshore, served):
    """The text with which the engine answers every prompt."""
    text = "It scatters 🌍 light."
    farshore.engine.auto = served.tokenizer.encode(text)
    return text


def _prompt(farshore):
    return list(farshore.engine.next_sequence().request.prompt)


@pytest.fixture
def chat_ids(encode_chat):
    return lambda text: encode_chat([{"role": "user", "content": text}])


def test_prints_the_answer(run, farshore, chat_ids, answer):
    done = run("generate", "Why blue?", "--server", farshore.address)
    assert (done.code, done.out, done.err) == (0, answer + "\n", "")
    assert _prompt(farshore) == chat_ids("Why blue?")


def test_raw(run, farshore, served, answer):
    run("generate", "Once upon", "--raw", "--server", farshore.address)
    assert _prompt(farshore) == served.tokenizer.encode("Once upon")


@pytest.mark.parametrize("whole", [True, False])
def test_chat(run, farshore, encode_chat, answer, whole):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why blue?"}]
    chat = {"messages": messages, "add_generation_prompt": True, "tools": [], "template_arguments": {"x": 1}}
    run("generate", json.dumps(chat if whole else messages), "--chat", "--server", farshore.address)
    assert _prompt(farshore) == encode_chat(messages)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hi", "--chat: the text is no JSON: Expecting value"),
        ("5", "--chat: give a list of messages, or an object with messages"),
        ('{"message": []}', "--chat: unknown field 'message': use messages, tools"),
        ('[{"role": "user", "text": "x"}]', "message 0 has the unknown field 'text'"),
    ],
)
def test_text_that_is_no_chat(run, farshore, text, words):
    done = run("generate", text, "--chat", "--server", farshore.address)
    assert done.code != 0 and words in done.err
    assert farshore.engine.idle


def test_sampling_options(run, farshore, answer):
    options = shlex.split(
        "--max-tokens 7 --temperature 0.5 --top-k 40 --top-p 0.5 --min-p 0.25 --repetition-penalty 1.5 "
        "--presence-penalty -0.5 --frequency-penalty 2 --logit-bias 42=-100 --logit-bias 7=2.5 --seed 9 "
        "--stop-token-id 11 --ignore-eos --cache-salt ours --min-tokens 3 --allowed-token-id 5 "
        "--allowed-token-id 6 --bad-word cat --truncate-prompt-tokens 2"
    )
    run("generate", "Hi", "--server", farshore.address, *options)
    request = farshore.engine.next_sequence().request
    sent = request.sampling
    assert (sent.max_tokens, sent.temperature, sent.top_k, sent.top_p) == (7, 0.5, 40, 0.5)
    assert (sent.min_p, sent.repetition_penalty) == (0.25, 1.5)
    assert (sent.presence_penalty, sent.frequency_penalty, sent.seed) == (-0.5, 2, 9)
    assert dict(sent.logit_bias) == {42: -100, 7: 2.5}
    assert list(sent.stop_token_ids) == [11]
    assert request.cache_salt == "ours"
    assert (sent.min_tokens, list(sent.allowed_token_ids)) == (3, [5, 6])
    assert len(request.bad_words) == 2 and len(request.prompt) == 2


@pytest.mark.parametrize("name", ["json-schema", "regex", "choice", "grammar"])
def test_structures(run, farshore, answer, tmp_path, name):
    texts = {"json-schema": '{"type": "object"}', "regex": "[0-9]+", "choice": "yes", "grammar": 'start: "a"'}
    text, field = texts[name], name.replace("-", "_")
    wanted = inference_pb2.Choices(texts=[text, "no"]) if name == "choice" else text
    expected = grammar_of(inference_pb2.Structure(**{field: wanted}))
    more = ["--choice", "no"] if name == "choice" else []
    file = tmp_path / "structure"
    file.write_text(text)
    for given in [text, f"@{file}"][: 2 if name in ("json-schema", "grammar") else 1]:
        assert run("generate", "Hi", "--server", farshore.address, f"--{name}", given, *more).code == 0
        assert farshore.engine.next_sequence().request.grammar == expected


@pytest.mark.parametrize("schema", ["{", "[]", "@/no/such/file"])
def test_schemas_that_are_none_start_nothing(run, cluster, nothing_listens, schema):
    assert run("generate", "Hi", "--json-schema", schema).code == 1
    assert cluster.config is None


def test_stop_strings(run, farshore, answer):
    done = run("generate", "Hi", "--server", farshore.address, "--stop", "never", "--stop", " light")
    assert (done.code, done.out) == (0, "It scatters 🌍\n")


@pytest.fixture
def two_choices(farshore, served):
    """The texts of two choices with which the engine answers the next prompt."""
    texts = ["One answer.", "Another 🌍"]

    def feed():
        sequence = farshore.engine.next_sequence()
        for choice, text in enumerate(texts):
            for token in served.tokenizer.encode(text):
                sequence.token(
                    token_id=token,
                    choice=choice,
                    logprob=-0.5,
                    top=[cluster_pb2.TokenLogprob(token_id=token, logprob=-0.5)],
                )
            sequence.finish(choice=choice)

    feeding = threading.Thread(target=feed)
    feeding.start()
    yield texts
    feeding.join(30)


def test_choices_are_printed_one_after_the_other(run, farshore, two_choices):
    done = run("generate", "Hi", "--server", farshore.address, "--n", "2", "--temperature", "1")
    assert (done.code, done.out) == (0, f"[0] {two_choices[0]}\n\n[1] {two_choices[1]}\n")


def test_choices_as_json(run, farshore, served, two_choices):
    options = ["--n", "2", "--temperature", "1", "--logprobs", "1", "--json"]
    result = json.loads(run("generate", "Hi", "--server", farshore.address, *options).out)
    assert not result.keys() & {"text", "token_ids", "finish_reason"}
    ids = [served.tokenizer.encode(text) for text in two_choices]
    assert result["completion_tokens"] == sum(map(len, ids))
    for index, choice in enumerate(result["choices"]):
        assert (choice["index"], choice["text"]) == (index, two_choices[index])
        assert choice["token_ids"] == ids[index] and choice["finish_reason"] == "stop"
        assert [token["token_id"] for token in choice["logprobs"]] == ids[index]
        first = choice["logprobs"][0]
        assert first == {
            "token_id": ids[index][0],
            "text": served.tokenizer.decode(ids[index][:1]),
            "logprob": -0.5,
            "top": [
                {
                    "token_id": ids[index][0],
                    "logprob": -0.5,
                    "text": served.tokenizer.decode(ids[index][:1]),
                }
            ],
        }


def test_json(run, farshore, served, answer):
    done = run("generate", "Why blue?", "--server", farshore.address, "--json")
    assert done.code == 0 and done.out.count("\n") == 1
    result = json.loads(done.out)
    times = {name: result.pop(name) for name in ("ttft_ms", "tpot_ms", "total_ms")}
    request_id = result.pop("request_id")
    assert all(isinstance(value, float) for value in times.values())
    sequence = farshore.engine.next_sequence()
    assert result == {
        "text": answer,
        "token_ids": farshore.engine.auto,
        "prompt_tokens": len(sequence.request.prompt),
        "completion_tokens": len(farshore.engine.auto),
        "cached_tokens": 2,
        "finish_reason": "stop",
        "queued_ms": 1.5,
        "shards": [{"worker_id": "attention-0", "process_id": 7, "attended_bytes": 4096}],
        "model": "smollm2",
    }
    assert request_id and request_id != sequence.request.sequence_id


def test_prompt_from_stdin(run, farshore, chat_ids, answer, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("From a pipe\n"))
    run("generate", "-", "--server", farshore.address)
    assert _prompt(farshore) == chat_ids("From a pipe\n")


def test_prompt_from_a_file(run, farshore, chat_ids, answer, tmp_path):
    (tmp_path / "long.txt").write_text("Größe 東京", encoding="utf-8")
    run("generate", f"@{tmp_path / 'long.txt'}", "--server", farshore.address)
    assert _prompt(farshore) == chat_ids("Größe 東京")


@pytest.mark.parametrize(
    "prompt", ["", "  \n", "-", "@", "@/no/such/file", "@/", "@latin1.txt", "@empty.txt"]
)
def test_bad_prompts_start_nothing(run, cluster, nothing_listens, monkeypatch, tmp_path, prompt):
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin1.txt").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("")
    done = run("generate", prompt)
    assert done.code == 1 and done.out == ""
    assert done.err.startswith("farshore: error: ") and done.err.count("\n") == 1
    assert cluster.config is None


def test_a_named_server_that_is_unreachable(run, cluster):
    done = run("generate", "Hi", "--server", "127.0.0.1:1")
    assert done.code == 3
    assert "no gateway answers at 127.0.0.1:1" in done.err and "farshore serve" in done.err
    assert cluster.config is None


def test_gateway_errors_are_one_line(run, farshore):
    done = run("generate", "Hi", "--server", farshore.address, "--model", "gpt-9")
    assert done.code == 1
    assert done.err.count("\n") == 1 and "'smollm2'" in done.err


@pytest.fixture
def ends_early(farshore, served):
    """ends_early(end) -> the text of the tokens that the engine sends of its next answer before it calls
    ``end(sequence)``."""
    text = "It scatters"
    threads = []

    def feed(end):
        def run():
            sequence = farshore.engine.next_sequence()
            sequence.tokens(*served.tokenizer.encode(text))
            end(sequence)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return text

    yield feed
    for thread in threads:
        thread.join(30)


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_an_answer_that_breaks_off_is_a_failure(run, farshore, ends_early, options):
    def fail(sequence):
        # The SDK tries to go on, and no engine takes the request.
        farshore.engine.refuses = (grpc.StatusCode.UNAVAILABLE, "shard lost")
        sequence.fail(*farshore.engine.refuses)

    text = ends_early(fail)
    done = run("generate", "Hi", "--server", farshore.address, *options)
    assert done.code == 3
    assert done.out == ("" if options else f"{text}\n")
    assert done.err.count("\n") == 1
    assert "shard lost" in done.err and "the same command asks again" in done.err


def test_an_answer_that_fails_for_good_suggests_no_retry(run, farshore, ends_early):
    ends_early(lambda sequence: sequence.fail(grpc.StatusCode.INVALID_ARGUMENT, "no such thing"))
    done = run("generate", "Hi", "--server", farshore.address)
    assert done.code == 1
    assert "no such thing" in done.err and "again" not in done.err


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_cancelled_answer_is_a_failure(run, farshore, ends_early, options):
    """An incomplete answer is never a success, even if the stream ends normally."""
    text = ends_early(lambda sequence: sequence.finish(reason=inference_pb2.FINISH_REASON_CANCELLED))
    done = run("generate", "Hi", "--server", farshore.address, *options)
    assert done.code == 1 and text in done.out
    assert "incomplete" in done.err and "asks again" in done.err


def test_a_long_prompt_shows_how_far_it_is(run, farshore, monkeypatch):
    """On a terminal, in one line that is removed when the answer begins."""

    read = threading.Event()

    class Terminal(io.StringIO):
        def isatty(self):
            return True

        def write(self, text):
            if "1500 of 1500" in text:
                read.set()
            return super().write(text)

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)

    def feed():
        sequence = farshore.engine.next_sequence()
        for done in (512, 1024, 1500):
            sequence.prefill(done, 1500)
        assert read.wait(30)
        sequence.tokens(7)
        sequence.finish()

    feeding = threading.Thread(target=feed)
    feeding.start()
    assert run("generate", "Hi", "--server", farshore.address).code == 0
    feeding.join(30)
    clear = "\r\x1b[2K"
    lines = terminal.getvalue().split(clear)
    # Earlier lines may be missing: the gateway sends only the newest progress to a slow reader.
    assert lines[-2:] == ["reading the prompt: 1500 of 1500 tokens", ""]


def test_starts_a_cluster_for_one_call(run, farshore, cluster, nothing_listens, answer):
    cluster.address = farshore.address
    done = run("generate", "Hi", "--attention-workers", "3", "--kv-memory", "64MiB", "--dtype", "float32")
    assert (done.code, done.out) == (0, answer + "\n")
    assert "starting a cluster" in done.err and "starting workers" in done.err
    config = cluster.config
    assert (config.port, config.spec.model, config.attention_workers) == (0, "smollm2", 3)
    assert (config.kv_memory_bytes, config.dtype) == (64 << 20, "float32")
    assert cluster.stops == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", ("bf16", 200.0, 0, "auto", "cpu")),
        ("--dtype float32", ("float32", 200.0, 0, "auto", "cpu")),
        ("--kv-format int8 --max-decode-stall-ms 50 --speculate 4", ("int8", 50.0, 4, "auto", "cpu")),
        ("--kv-format int4 --dtype float32", ("int4", 200.0, 0, "auto", "cpu")),
        ("--device cuda:1", ("bf16", 200.0, 0, "cuda:1", "cpu")),
        ("--device cpu --attention-device cuda", ("bf16", 200.0, 0, "cpu", "cuda")),
    ],
)
def test_options_reach_the_configuration(run, farshore, cluster, nothing_listens, answer, options, expected):
    cluster.address = farshore.address
    assert run("generate", "Hi", *options.split()).code == 0
    config = cluster.config
    limits = (config.stored_format, config.max_decode_stall_ms, config.speculate)
    assert (*limits, config.device, config.attention_device) == expected


def test_a_running_gateway_is_used(run, farshore, cluster, answer, monkeypatch):
    monkeypatch.setattr("farshore.client.cli.connect.DEFAULT_SERVER", farshore.address)
    assert run("generate", "Hi").out == answer + "\n"
    assert cluster.config is None


def test_cluster_that_does_not_start(run, cluster, nothing_listens):
    def fail():
        raise StartupError("no memory:\ntry less")

    cluster.on_start = fail
    done = run("generate", "Hi")
    assert done.code == 1
    assert done.err.endswith("farshore: error: no memory: try less\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_stops_the_cluster_quietly(run, farshore, cluster, nothing_listens, number):
    cluster.address = farshore.address
    cluster.on_wait = None

    def interrupt():
        os.kill(os.getpid(), number)

    cluster.on_start = interrupt
    done = run("generate", "Hi")
    assert done.code == 130 and done.out == ""
    assert "Traceback" not in done.err


def test_log_probabilities_of_the_prompt_and_a_priority(run, farshore):
    asked = []

    def answer():
        sequence = farshore.engine.next_sequence()
        asked.append(sequence.request)
        sequence.prompt_logprobs(0, {"token_id": 5}, {"token_id": 6, "logprob": -0.5, "rank": 3})
        sequence.finish()

    feeding = threading.Thread(target=answer)
    feeding.start()
    options = ["--prompt-logprobs", "0", "--priority", "-2", "--json"]
    scored = json.loads(run("generate", "Hi", "--server", farshore.address, *options).out)["prompt_logprobs"]
    feeding.join(30)
    assert [(token["token_id"], token["logprob"], token["rank"]) for token in scored] == [
        (5, None, 0),
        (6, -0.5, 3),
    ]
    assert asked[0].priority == -2 and asked[0].sampling.prompt_logprobs == 0
