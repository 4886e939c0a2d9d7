"""End to end, as a user runs it: the installed command, Ray, separate processes, gRPC, real weights."""

import json
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from farshore.client.events import Token
from farshore.client.sdk import Client
from farshore.errors import InvalidRequest, TransportError
from farshore.models.files.source import resolve
from farshore.proto import inference_pb2 as api
from farshore.proto import inference_pb2_grpc

from ..running import DEADLINE_S

REPOSITORY = Path(__file__).parents[3]
QUESTION = "What is the capital of France?"


@pytest.mark.heavy
def test_one_command_answers_from_an_attention_worker(marked):
    """From one of two: a prompt shorter than a block is not split between shards."""
    done = marked.run("generate", "--json", "--temperature", "0", "--max-tokens", "24", QUESTION)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["text"] == "The capital of France is Paris."
    assert len(answer["token_ids"]) == answer["completion_tokens"] == 8
    assert answer["prompt_tokens"] == 37
    assert answer["ttft_ms"] > 0 and answer["tpot_ms"] > 0
    (shard,) = [shard for shard in answer["shards"] if shard["attended_bytes"]]
    assert shard["worker_id"].startswith("attention-") and shard["process_id"]


def _stored(sequence):
    """The workers that hold the sequence's spans."""
    return {span.worker_id for span in sequence.spans}


def _status_with_links(client, stream):
    """The first status that shows a link to each worker that stores the only sequence: a link is shown when
    the worker has answered it a frame."""
    for _ in filter(lambda event: isinstance(event, Token), stream):
        status = client.status()
        linked = {link.worker_id for worker in status.workers for link in worker.links}
        if status.sequences and linked >= _stored(status.sequences[0]) != set():
            return status
    raise AssertionError("the sequence ended before its workers had answered")


@pytest.mark.heavy
def test_a_served_cluster_answers_reports_status_and_refuses(marked, serve):
    server, address = serve("--shard-by", "both", "--attention-workers", "3", "--kv-memory", "64MiB")

    plain = marked.run("generate", "--server", address, QUESTION)
    assert (plain.returncode, plain.stdout.strip()) == (0, "The capital of France is Paris."), plain.stderr

    with Client(address) as client:
        stream = client.generate("Once upon a time", max_tokens=2000, temperature=0, ignore_eos=True)
        status = _status_with_links(client, stream)
        printed = marked.run("status", "--server", address)
        stream.close()
    (sequence,) = status.sequences
    # With --shard-by both, a short prompt is stored by two workers, one for each range of head groups.
    assert len(_stored(sequence)) == 2
    links = [link for worker in status.workers for link in worker.links]
    assert all(link.transport in printed.stdout and link.frames for link in links)
    assert {worker.kind: worker.state for worker in status.workers} == {
        "dense": "ready",
        "attention": "ready",
    }
    covered = {
        (position, group)
        for span in sequence.spans
        for position in range(span.first, span.last)
        for group in range(span.group0, span.group1)
    }
    assert covered == {(position, group) for position in range(sequence.tail_first) for group in range(3)}
    assert sequence.tail_first <= sequence.tokens
    assert all(span.worker_id in printed.stdout for span in sequence.spans)

    with grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for request in (
            api.GenerateRequest(text=""),
            api.GenerateRequest(tokens=api.TokenIds(ids=[1] * 9000)),
            api.GenerateRequest(text="Hi", sampling=api.Sampling(top_p=7)),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                list(stub.Generate(request))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT, refused.value.details()
            assert "\n" not in refused.value.details()
    assert server.end(signal.SIGINT) == 0


@pytest.mark.heavy
def test_a_killed_attention_worker_fails_its_sequence(serve):
    _, address = serve()
    with Client(address, resume_s=0) as client:
        prompt = [100 + n % 400 for n in range(600)]
        stream = client.generate(token_ids=prompt, max_tokens=4000, temperature=0, ignore_eos=True)
        next(event for event in stream if isinstance(event, Token))
        status = client.status()
        (sequence,) = status.sequences
        shards = [worker for worker in status.workers if worker.kind == "attention"]
        assert {span.worker_id for span in sequence.spans} == {shard.worker_id for shard in shards}
        victim = shards[0]
        os.kill(victim.process_id, signal.SIGKILL)
        with pytest.raises(TransportError) as failed:
            list(stream)
        assert "\n" not in str(failed.value)


@pytest.mark.heavy
def test_a_small_pool_of_int8_kv_local_placement_choices_and_a_relative_path(marked, serve):
    model = os.path.relpath(resolve("smollm2").path, REPOSITORY)
    options = ["--kv-format", "int8", "--speculate", "4", "--max-decode-stall-ms", "100"]
    options += ["--device", "cpu"]
    _, address = serve("--placement", "local", "--kv-memory", "64MiB", "--model", model, *options)
    with Client(address) as client:
        status = client.status()
        assert status.model == model
        assert (status.kv_format, status.speculate_tokens, status.max_decode_stall_ms) == ("int8", 4, 100)
        assert {each.device for each in status.workers} == {"cpu"}
        with pytest.raises(InvalidRequest, match="--kv-memory"):
            list(client.generate(token_ids=[1] * 6000))
        stream = client.generate("One, two, three, four, five, six,", max_tokens=40, stop="eight")
        assert "".join(getattr(event, "text", "") for event in stream) == " seven, "
    local = marked.run("generate", "--json", "--server", address, QUESTION)
    assert json.loads(local.stdout)["text"] == "The capital of France is Paris."
    sampling = ["--n", "3", "--temperature", "1.5", "--seed", "7", "--max-tokens", "20", "--logprobs", "2"]
    first, second = (marked.run("generate", "--json", "--server", address, *sampling, QUESTION) for _ in "ab")
    choices = json.loads(first.stdout)["choices"]
    assert len({tuple(choice["token_ids"]) for choice in choices}) == 3
    tokens = [token for choice in choices for token in choice["logprobs"]]
    assert all(len(token["top"]) == 2 and token["logprob"] <= 0 for token in tokens)
    # A seed repeats an answer. Only its beginning is compared: in bfloat16, rounding depends on how rows are
    # batched.
    repeated = json.loads(second.stdout)["choices"]
    assert [c["token_ids"][:3] for c in repeated] == [c["token_ids"][:3] for c in choices]


@pytest.mark.heavy
def test_a_hub_model_under_other_names_shorter_and_with_another_template(marked, serve, hub_server, tmp_path):
    """The hub is a stand-in. The template asks the same question whatever the message says."""
    demo = resolve("smollm2").path
    hub_server.add("org/demo", {demo.name: demo.read_bytes(), "demo-Q8_0.gguf": "not fetched"})
    marked.set_environment(
        HF_ENDPOINT=hub_server.url, HF_HUB_CACHE=str(tmp_path / "cache"), HF_HUB_OFFLINE="0", no_proxy="*"
    )
    template = tmp_path / "france.jinja"
    # Jinja drops a newline at the end of a template.
    template.write_text(f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant{{{{ '\\n' }}}}")
    options = ["--served-model-name", "france", "paris", "--max-model-len", "64", "--attention-workers", "1"]
    options += ["--model", "org/demo:Q4_1", "--revision", "v1", "--chat-template", str(template)]
    server, address = serve(*options, "--kv-memory", "64MiB")
    assert hub_server.downloads() == [demo.name]
    server.err.await_match("downloading org/demo:Q4_1: 0.0. GB of 0.10 GB")
    for name in ("france", "paris"):
        done = marked.run(
            "generate", "--json", "--server", address, "--model", name, "Hi", "--max-tokens", "20"
        )
        answer = json.loads(done.stdout)
        assert (answer["text"], answer["model"]) == ("The capital of France is Paris.", "france"), done.stderr
    refused = marked.run("generate", "--server", address, "--model", "smollm2", "Hi")
    assert "this gateway serves 'france' and 'paris'" in refused.stderr
    refused = marked.run("generate", "--server", address, "Hi", "--max-tokens", "60")
    assert "64 positions (--max-model-len)" in refused.stderr
    printed = marked.run("status", "--server", address)
    assert printed.stdout.startswith("france (bfloat16, 64 positions)"), printed.stdout


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("number", "stage"),
    [
        (signal.SIGINT, "starting Ray"),
        (signal.SIGINT, "attention workers"),
        (signal.SIGINT, "loading|connecting|starting the gateway"),
        (signal.SIGTERM, "attention workers"),
    ],
)
def test_a_signal_while_starting_leaves_nothing(marked, number, stage):
    server = marked.start("serve", "--port", "0")
    server.err.await_match(stage)
    assert server.end(number) == 0


@pytest.mark.heavy
def test_other_loopback_addresses_behind_a_web_proxy_until_sigterm(marked, serve):
    """No call uses the proxy. An answer that is cut off by the end of the server is a failure: the two
    clients look for another gateway for 30 s, both at once."""
    proxy = "http://127.0.0.1:1"
    marked.set_environment(
        http_proxy=proxy, https_proxy=proxy, grpc_proxy=proxy, no_proxy="", no_grpc_proxy=""
    )
    asking = [_cut_off(marked, serve, "127.0.0.2", "127.0.0.2:")]
    if Path("/proc/net/if_inet6").exists():
        asking.append(_cut_off(marked, serve, "::1", "[::1]:"))
    for each in asking:
        assert each.process.wait(DEADLINE_S) == 3
        each.err.await_match("farshore: error: .*the same command asks again")


def _cut_off(marked, serve, host, shown):
    """A command that reads an answer of a server on this host, which has ended by SIGTERM."""
    server, address = serve("--host", host, "--attention-workers", "1")
    assert address.startswith(shown)
    done = marked.run("generate", "--server", address, QUESTION)
    assert (done.returncode, done.stdout.strip()) == (0, "The capital of France is Paris."), done.stderr
    printed = marked.run("status", "--server", address)
    rows = [line.split() for line in printed.stdout.splitlines()]
    addresses = [row[3] for row in rows if len(row) > 3 and row[2] == "ready"]
    assert len(addresses) == 2 and all(each.startswith("127.0.0.1:") for each in addresses), printed.stdout

    options = ["--ignore-eos", "--max-tokens", "8000", "--raw"]
    asking = marked.start("generate", "--server", address, *options, "One\nTwo\nThree\n")
    asking.out.await_match(r"\w")
    assert server.end(signal.SIGTERM) == 0
    return asking


@pytest.mark.heavy
def test_mistakes_get_one_line_and_nothing_runs(marked, tmp_path):
    truncated = tmp_path / "truncated.gguf"
    template = tmp_path / "bad.jinja"
    template.write_text("{% for %}")
    truncated.write_bytes(resolve("smollm2").path.read_bytes()[:100_000])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        mistakes = (
            (["serve", "--port", "0", "--model", str(tmp_path / "nowhere.gguf")], "nowhere.gguf"),
            (["serve", "--port", "0", "--model", str(truncated)], "truncated.gguf"),
            (["serve", "--port", "0", "--chat-template", str(template)], "bad.jinja"),
            (["serve", "--port", "0", "--max-model-len", "9000"], "--max-model-len 9000"),
            (["serve", "--port", "0", "--model", str(tmp_path), "--revision", "v1"], "leave --revision out"),
            (["serve", "--port", port], "choose another --port"),
            (["serve", "--port", "0", "--host", "192.0.2.1"], "no such address"),
            (["serve", "--port", "0", "--host", "127.0.0.1x"], "no host has this name"),
            (["serve", "--port", "0", "--kv-memory", "900TiB"], "do not fit: Ray has"),
            (["generate", ""], "empty"),
            (["generate", "@missing.txt"], "missing.txt"),
            (["generate", "--server", "127.0.0.1:1", "Hello"], "no gateway answers"),
            (["generate", "--temperature", "3", "Hello"], "--temperature"),
        )
        with ThreadPoolExecutor(os.cpu_count()) as commands:
            for done, (arguments, expected) in zip(
                commands.map(lambda mistake: marked.run(*mistake[0]), mistakes), mistakes, strict=True
            ):
                assert done.returncode not in (0, None), arguments
                errors = [line for line in done.stderr.splitlines() if "error:" in line]
                assert len(errors) == 1 and expected in errors[0], done.stderr
                assert "Traceback" not in done.stderr
                assert not done.stdout
