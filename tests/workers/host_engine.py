"""An engine as a program, for ``test_hosts``: it runs by path inside a network namespace.

Its argument is a JSON object with ``folder`` (the model), ``shards`` (worker to address), ``transports`` and
``token_file``.
Each line of standard input is a JSON object with ``prompt``, ``max_tokens`` and ``pause_at``; the program
prints a JSON object for each token and for the end of the request. The engine stands still at the token with
the number ``pause_at``, if it is not 0, until it reads one more line. It ends when its input is closed.
"""

import itertools
import json
import queue
import sys
import threading
import time

import torch

from farshore.attention_offload.client.remote import RemoteClient
from farshore.attention_offload.transport.frames import Transport
from farshore.cluster_token import ClusterToken
from farshore.errors import FarshoreError
from farshore.ids import FIRST_EPOCH, SequenceId, WorkerId
from farshore.kvstore.store.arena.arena import Arena
from farshore.models.files.source import resolve
from farshore.models.weights.load import load_model
from farshore.sampling import Sampling
from farshore.workers.engine.attention_model import attention_model
from farshore.workers.engine.engine import Engine
from farshore.workers.engine.sequence import Failed, Finished, Sampled


def say(**fields):
    print(json.dumps(fields), flush=True)


def await_shards(engine):
    """Waits until each shard has answered, however slow its link is: the engine places on those that have."""
    end_s, pause = time.monotonic() + 60, threading.Event()
    while not all(engine.shards().values()):
        assert time.monotonic() < end_s, "a shard does not answer"
        pause.wait(0.01)


def main():
    torch.set_num_threads(1)
    options = json.loads(sys.argv[1])
    model = load_model(resolve(options["folder"]), dtype=torch.float32)
    attention = attention_model(model.config, model.dtype)
    clients = {
        WorkerId(worker): RemoteClient(
            address,
            attention,
            model.dtype,
            transports=[Transport(name) for name in options["transports"]],
            token=ClusterToken.read(options["token_file"]),
        )
        for worker, address in options["shards"].items()
    }
    engine = Engine(
        model=model,
        attention=attention,
        arena=Arena(32 << 20),
        clients=clients,
        targets=list(clients),
        shard_by="range",
    )
    engine.start()
    await_shards(engine)
    for number, line in enumerate(sys.stdin):
        command = json.loads(line)
        events, go_on, drawn = queue.SimpleQueue(), threading.Event(), itertools.count(1)

        def emit(event, command=command, events=events, go_on=go_on, drawn=drawn):
            events.put(event)
            if isinstance(event, Sampled) and next(drawn) == command["pause_at"]:
                assert go_on.wait(120)

        sampling = Sampling(max_tokens=command["max_tokens"], temperature=0.0)
        try:
            engine.submit(SequenceId(str(number)), command["prompt"], sampling, emit, epoch=FIRST_EPOCH)
        except FarshoreError as error:
            events.put(Failed(error))
        event, tokens = None, 0
        while not isinstance(event, Finished | Failed):
            event = events.get(timeout=120)
            if isinstance(event, Sampled):
                say(token=event.token_id)
                tokens += 1
                if tokens == command["pause_at"]:
                    sys.stdin.readline()
                    go_on.set()
        links = {link.worker_id: [link.transport, link.failures] for link in engine.links()}
        if isinstance(event, Failed):
            say(failed=f"{type(event.error).__name__}: {event.error}", links=links)
        else:
            say(finished=event.reason.value, links=links)
    engine.stop()


main()
