"""An engine on a host of its own, for ``test_hosts``: run by path inside a network namespace. Takes commands
on standard input, says in JSON objects what comes of them, and ends with its input.

Argument: a JSON object of ``folder``, ``shards`` (worker to address), ``transports``.
Commands: a JSON object of ``prompt`` and ``max_tokens``.
"""

import json
import queue
import sys
from itertools import count

import torch

from farshore.attention_offload.client.remote import RemoteClient
from farshore.attention_offload.transport.frames import Transport
from farshore.errors import FarshoreError
from farshore.ids import SequenceId, WorkerId
from farshore.kvstore.store.arena import Arena
from farshore.models.source import resolve
from farshore.models.weights import load_model
from farshore.workers.engine.attention_model import attention_model
from farshore.workers.engine.engine import Engine
from farshore.workers.engine.sequence import Failed, Finished, Sampled, Sampling


def say(**fields):
    print(json.dumps(fields), flush=True)


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
        )
        for worker, address in options["shards"].items()
    }
    epochs = count(1)
    engine = Engine(
        model=model,
        attention=attention,
        arena=Arena(32 << 20),
        clients=clients,
        targets=list(clients),
        shard_by="range",
        claim=lambda _: next(epochs),
    )
    engine.start()
    for number, line in enumerate(sys.stdin):
        command = json.loads(line)
        events = queue.SimpleQueue()
        sampling = Sampling(max_tokens=command["max_tokens"], temperature=0.0)
        try:
            engine.submit(SequenceId(str(number)), command["prompt"], sampling, events.put)
        except FarshoreError as error:
            events.put(Failed(error))
        event = None
        while not isinstance(event, Finished | Failed):
            event = events.get(timeout=120)
            if isinstance(event, Sampled):
                say(token=event.token_id)
        links = {link.worker_id: [link.transport, link.failures] for link in engine.links()}
        if isinstance(event, Failed):
            say(failed=f"{type(event.error).__name__}: {event.error}", links=links)
        else:
            say(finished=event.reason.value, links=links)
    engine.stop()


main()
