"""Texts that follow JSON schemas, drawn at temperature 1 by the demo model behind a real gateway."""

import json
import random

import jsonschema
import pytest
import torch

from farshore import rpc
from farshore.proto import cluster_pb2, cluster_pb2_grpc
from farshore.proto import inference_pb2 as api
from farshore.workers.engine.constraints.grammar import GrammarCompiler
from farshore.workers.engine_service import EngineService

MOST_TOKENS = 200
DEADLINE_S = 1500
LEAST_STOPPED = 0.6
PATTERNS = (r"^[a-z]{2,8}$", r"^[0-9]{3}-[0-9]{2}$", r"^(x|yy){1,5}z?$")
WORDS = ("name", "city", "colour", "amount", "owner", "state", "tags", "weight", "code", "parts")


class Schemas:
    """Draws schemas of the keywords that docs/structured-output.md lists, with bounded lengths."""

    def __init__(self, seed):
        self._draw = random.Random(seed)

    def __call__(self):
        definition = {"type": "object", "properties": {"id": self.leaf()}, "required": ["id"]}
        definition["additionalProperties"] = False
        schema = self.object(2)
        return {**schema, "$defs": {"item": definition}}

    def object(self, depth):
        names = self._draw.sample(WORDS, self._draw.randint(1, 3))
        required = [name for name in names if self._draw.random() < 0.8]
        return {
            "type": "object",
            "properties": {name: self.value(depth - 1) for name in names},
            "required": required,
            "additionalProperties": False,
        }

    def value(self, depth):
        kinds = [self.leaf, self.leaf, self.any_of, self.ref]
        if depth > 0:
            kinds += [lambda: self.object(depth), lambda: self.array(depth)]
        return self._draw.choice(kinds)()

    def array(self, depth):
        least = self._draw.randint(0, 2)
        most = least + self._draw.randint(0, 2)
        return {"type": "array", "items": self.value(depth - 1), "minItems": least, "maxItems": most}

    def any_of(self):
        return {"anyOf": [self.leaf(), self.leaf(), {"type": "null"}]}

    def ref(self):
        return {"$ref": "#/$defs/item"}

    def leaf(self):
        draw = self._draw
        low = draw.randint(-50, 50)
        return draw.choice(
            [
                {"type": "string", "minLength": draw.randint(0, 3), "maxLength": draw.randint(3, 16)},
                {
                    "type": "string",
                    "pattern": draw.choice([r"^[a-z]{2,8}$", r"^\d{3}-\d{2}$", r"^(x|yy)+z?$"]),
                },
                {"enum": draw.sample([*WORDS, 1, 2.5, True, None, 'a "quoted" word', "über"], 3)},
                {"const": draw.choice(WORDS)},
                {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 1000)},
                {"type": "number", "exclusiveMinimum": low, "maximum": low + draw.randint(1, 100)},
                {"type": ["boolean", "null"]},
            ]
        )


@pytest.fixture
def stub(demo_model, demo_source, tokenizer, rig, harness, loop_thread, served):
    """A stub of a gateway in front of an engine that runs the demo model."""
    cluster = rig(demo_model(torch.bfloat16), shards=1, memory_bytes=2 << 30)
    engine = cluster.start()
    config = cluster.model.config
    service = EngineService(
        worker="engine",
        engine=engine,
        store=cluster.stores["engine"],
        shards={worker: client.identify() for worker, client in cluster.clients.items()},
        grammars=GrammarCompiler(lambda: tokenizer, vocab=config.vocab, eos_ids=config.eos_token_ids),
    )
    server, address = rpc.serve(
        lambda server: cluster_pb2_grpc.add_EngineServicer_to_server(service, server),
        service=cluster_pb2.DESCRIPTOR.services_by_name["Engine"].full_name,
        listen="127.0.0.1:0",
        threads=256,
        token=None,
    )
    with harness.gateway(loop_thread, served, engine_address=address) as gateway:
        yield gateway.stub
    server.stop(0).wait()


def text_of(events):
    tokens = "".join(event.token.text for event in events)
    return tokens + events[-1].finished.choices[0].text


@pytest.mark.parametrize(
    "schemas", [pytest.param(20, marks=pytest.mark.heavy), pytest.param(200, marks=pytest.mark.soak)]
)
def test_texts_are_valid(stub, schemas):
    draw = Schemas(seed=20)
    drawn = [draw() for _ in range(schemas)]
    calls = []
    for seed, schema in enumerate(drawn):
        structure = api.Structure(json_schema=json.dumps(schema))
        sampling = api.Sampling(max_tokens=MOST_TOKENS, temperature=1.0, seed=seed, structure=structure)
        message = api.Message(role="user", content="Invent an example. Answer in JSON.")
        request = api.GenerateRequest(chat=api.Chat(messages=[message]), sampling=sampling)
        calls.append(stub.Generate(request, timeout=DEADLINE_S))
    stopped = 0
    for schema, call in zip(drawn, calls, strict=True):
        events = list(call)
        text, reason = text_of(events), events[-1].finished.choices[0].reason
        if reason == api.FINISH_REASON_STOP:
            stopped += 1
            validator = jsonschema.Draft202012Validator(schema)
            assert list(validator.iter_errors(json.loads(text))) == [], (schema, text)
        else:
            assert reason == api.FINISH_REASON_LENGTH
    print(f"{stopped} of {schemas} texts ended by themselves, all of them valid")
    assert stopped >= LEAST_STOPPED * schemas
