"""Fixtures that several folders of tests share: the demo model, prompts, shards, the gateway's harness."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Without a GPU, triton must run kernels in its interpreter. It reads the variable at its first import, made
# here because transformers imports triton, too. The variable is unset again for the tests' child processes.
if not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton  # noqa: F401

from farshore.attention_offload.client.remote import RemoteClient
from farshore.attention_offload.shard.server import serve
from farshore.attention_offload.shard.service import AttentionService
from farshore.benchmarks.engines.redis_server import binaries
from farshore.controller.listen import free_port
from farshore.rpc import SHARD_ENVIRONMENT

# An example on a busy machine takes as long as it takes.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

STOP_DEADLINE_S = 60.0
LONG_TEXT_TOKENS = 4100


def _load(name, path):
    """The module at ``path``, loaded once: test folders are no packages and not on sys.path."""
    name = f"farshore_tests_{name}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def pytest_collection_modifyitems(config, items):
    """Leaves out long forms unless the marker expression names them, as ``-m soak`` does."""
    if "soak" not in config.getoption("markexpr"):
        long_forms = [item for item in items if item.get_closest_marker("soak")]
        items[:] = [item for item in items if item not in long_forms]
        config.hook.pytest_deselected(items=long_forms)


@pytest.fixture(scope="session")
def server_binary():
    """server_binary(name) -> path of the program of a redis or valkey server. Without it the test is skipped
    on a developer's machine, and fails in CI."""

    def find(name):
        found = binaries().get(name)
        if found is None and not os.environ.get("CI"):
            pytest.skip(f"no {name}-server on this machine")
        assert found is not None, f"install {name}-server"
        return found

    return find


@pytest.fixture(scope="session")
def demo_source():
    from farshore.models.files.source import resolve

    return resolve("smollm2")


@pytest.fixture(scope="session")
def tokenizer(demo_source):
    from farshore.models.tokenizer.load import load_tokenizer

    return load_tokenizer(demo_source)


@pytest.fixture(scope="session")
def encode_chat(tokenizer):
    """encode_chat(messages) -> ids of the demo model's prompt."""
    from farshore.models.chat.prompts import ChatPrompts, Conversation

    prompts = ChatPrompts(tokenizer)
    yield lambda messages: prompts.encode(Conversation(messages=messages), most_chars=1 << 20)
    prompts.close()


@pytest.fixture(scope="session")
def hugging_face(demo_source):
    """load(dtype, attention implementation) -> transformers' model, see hugging_face.py."""
    return _load("hugging_face", "hugging_face.py").Models(demo_source.path).load


@pytest.fixture(scope="session")
def hugging_face_greedy():
    """The function ``greedy`` of hugging_face.py."""
    return _load("hugging_face", "hugging_face.py").greedy


@pytest.fixture(scope="session")
def prompts(tokenizer, encode_chat):
    """24 varied prompts, name -> token ids, that all tests of correctness use."""

    def chat(text):
        return encode_chat([{"role": "user", "content": text}])

    story = " ".join(
        f"On day {n} the keeper of lighthouse number {n * 7 % 101} wrote: the wind came from the"
        f" {('north', 'east', 'south', 'west')[n % 4]}, {n * 13 % 50} ships passed, and the lamp burned"
        f" {('well', 'low', 'not at all')[n % 3]}."
        for n in range(400)
    )
    story_ids = tokenizer.encode(story)
    assert len(story_ids) > LONG_TEXT_TOKENS
    return {
        "one word": tokenizer.encode("Hello"),
        "one token": tokenizer.encode("The")[:1],
        "capital": chat("What is the capital of France?"),
        "explain": chat("Explain in two sentences why the sky is blue."),
        "poem": chat("Write a short poem about the sea."),
        "sum": chat("What is 17 + 25? Answer with the number only."),
        "list": chat("Name five fruits, one on each line."),
        "translate": chat("Translate 'good morning' into French, German and Spanish."),
        "system": encode_chat(
            [
                {"role": "system", "content": "You are a pirate. Answer like one."},
                {"role": "user", "content": "How is the weather today?"},
            ]
        ),
        "python": tokenizer.encode("def fibonacci(n):\n    if n < 2:\n        return n\n    return"),
        "sql": tokenizer.encode("SELECT name, COUNT(*) FROM orders WHERE"),
        "html": tokenizer.encode("<html>\n<head><title>Home</title></head>\n<body>\n<h1>"),
        "json": tokenizer.encode('{"name": "Ada", "born": 1815, "languages": ['),
        "chinese": tokenizer.encode("今天天气很好，我们去"),  # noqa: RUF001
        "arabic": tokenizer.encode("كانت المدينة القديمة"),
        "russian": tokenizer.encode("Жили-были старик со старухой у самого синего"),  # noqa: RUF001
        "emoji": tokenizer.encode("🎉🎂 Happy birthday! 🥳"),
        "digits": tokenizer.encode("3.14159265358979"),
        "block minus one": story_ids[:255],
        "block": story_ids[:256],
        "block plus one": story_ids[:257],
        "two blocks": story_ids[100:612],
        "near a hand-off": story_ids[:750],
        "long": story_ids[:LONG_TEXT_TOKENS],
    }


@pytest.fixture
def sanitiser(tmp_path_factory):
    """A Sanitiser, see sanitiser.py."""
    return _load("sanitiser", "sanitiser.py").sanitiser_in(tmp_path_factory.mktemp("sanitised"))


@pytest.fixture(scope="session")
def harness():
    """The module gateway/harness.py: a real gateway in this process, over an engine that the test
    controls."""
    return _load("gateway_harness", "gateway/harness.py")


@pytest.fixture
def hub_server():
    """A StandInHub, see models/files/stand_in_hub.py. Closed after the test."""
    server = _load("stand_in_hub", "models/files/stand_in_hub.py").StandInHub()
    yield server
    server.close()


@pytest.fixture(scope="session")
def served():
    """The demo model as a gateway serves it."""
    from farshore.gateway.served import Served
    from farshore.model_spec import ModelSpec

    model = Served.load(ModelSpec())
    yield model
    model.chat.close()


@pytest.fixture(scope="session")
def loop_thread(harness):
    """The event loop, in a thread, of all gateways of the session."""
    thread = harness.LoopThread()
    yield thread
    thread.stop()


@pytest.fixture
def both_sdks(loop_thread):
    """Two functions, sdk(address, …) -> a Client, and an AsyncClient with the calls of one. Closed after the
    test."""
    from farshore.client.sdk import Client

    with contextlib.ExitStack() as clients:
        blocking = _load("blocking_client", "client/blocking.py").BlockingClient
        yield (
            lambda *arguments, **options: clients.enter_context(Client(*arguments, **options)),
            lambda *arguments, **options: clients.enter_context(blocking(loop_thread, *arguments, **options)),
        )


@pytest.fixture(params=["Client", "AsyncClient"])
def sdk(request, both_sdks):
    """One of ``both_sdks``, in turn."""
    return both_sdks[request.param == "AsyncClient"]


class Shard:
    """A store behind a gRPC server on loopback, which can be stopped and restarted on the same port."""

    service_name = "farshore.attention.v1.Attention"

    def __init__(self, store, worker, service):
        self.store = store
        self.worker = worker
        self.service = service(worker, store)
        self.server, self.address = serve(self.service, f"127.0.0.1:{free_port('127.0.0.1')}")

    def stop(self):
        assert self.server.stop(None).wait(STOP_DEADLINE_S)

    def restart(self):
        self.stop()
        self.server, _ = serve(self.service, self.address)


@pytest.fixture
def serve_store():
    """serve_store(store, worker, service=...) -> Shard. Stopped after the test; its store's integrity is
    checked."""
    started = []

    def start(store, worker, *, service=AttentionService):
        started.append(Shard(store, worker, service))
        return started[-1]

    yield start
    for shard in started:
        shard.stop()
        shard.store.check_integrity()


@pytest.fixture
def connect():
    """connect(address, model=..., ...) -> RemoteClient, closed after the test."""
    clients = []

    def to(address, *, model, **options):
        clients.append(RemoteClient(address, model, model.layouts[0].format.dtype, **options))
        return clients[-1]

    yield to
    for client in clients:
        client.close()


class Breaking(AttentionService):
    """A shard that runs ``do[n]`` with the call's context before it sends its n-th answer, from 1."""

    def __init__(self, worker, store):
        super().__init__(worker, store)
        self.answers = 0
        self.do = {}
        self.stream_ended = threading.Event()

    def Attend(self, frames, context):
        try:
            for state in super().Attend(frames, context):
                self.answers += 1
                self.do.get(self.answers, lambda _: None)(context)
                yield state
        finally:
            self.stream_ended.set()


@pytest.fixture
def breaking_service():
    """The class Breaking, a ``service`` for ``serve_store``."""
    return Breaking


class WorkerProcess:
    """An attention worker in its own process, which can be frozen, killed and restarted."""

    def __init__(self, listen=None, *, prefix=(), worker="shard", kv_memory_bytes=8 << 20, token_file=None):
        self._prefix, self._worker, self._kv_memory_bytes = prefix, worker, kv_memory_bytes
        self._token_file = token_file
        # Where it is started again.
        self._start(listen or f"127.0.0.1:{free_port('127.0.0.1')}")

    def _start(self, listen):
        command = [*self._prefix, sys.executable, "-P", "-m", "farshore.workers.attention"]
        command += ["--worker", self._worker, "--kv-memory-bytes", str(self._kv_memory_bytes)]
        command += ["--listen", listen]
        command += ["--token-file", self._token_file] if self._token_file else []
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | SHARD_ENVIRONMENT,
        )
        self.address = self.process.stdout.readline().strip()
        assert self.address, f"the attention worker ended with {self.process.wait()}"

    def freeze(self):
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)

    def thaw(self):
        self.process.send_signal(signal.SIGCONT)
        os.waitpid(self.process.pid, os.WCONTINUED)

    def kill(self):
        """Also ends a frozen process. Idempotent."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def restart(self):
        """Starts a new process on the same port, without any spans."""
        self.kill()
        self._start(self.address)


@pytest.fixture(scope="session")
def worker_process():
    """The class WorkerProcess."""
    return WorkerProcess


@pytest.fixture
def start_process():
    """start_process(listen=..., worker=..., ...) -> WorkerProcess, killed after the test."""
    started = []

    def start(*args, **options):
        started.append(WorkerProcess(*args, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()


class Clock:
    """A clock that only the test advances."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(scope="session")
def new_environment():
    """new_environment(folder, *packages, **variables) -> the python of a virtual environment with packages
    and all that they require. Skips the test where no package index can be reached."""

    def make(folder, *packages, **variables):
        subprocess.run([sys.executable, "-P", "-m", "venv", folder / "venv"], check=True, timeout=120)
        python = folder / "venv" / "bin" / "python"
        done = subprocess.run(
            [python, "-P", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages],
            capture_output=True,
            text=True,
            timeout=600,
            cwd=folder,
            env=os.environ | variables,
        )
        if "from versions: none" in done.stderr:
            pytest.skip("no package index can be reached")
        assert done.returncode == 0, done.stderr
        return python

    return make
