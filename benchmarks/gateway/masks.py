"""Measures the CPU time of a structured text's masks, warm: the grammar has met such a text before.

Called by ``gateway.benchmark``. An engine computes masks beside its steps, so a mask must take a small part
of one. Must not know the model: tokens are drawn from those that a mask allows.
"""

import json
import random
import time

import numpy as np

from farshore.benchmarks.cases import Measured
from farshore.benchmarks.gateway.setting import Setting
from farshore.benchmarks.report import Bar, Result
from farshore.benchmarks.timing import Timing
from farshore.gateway.requests.structure import grammar_of
from farshore.models.files.source import DEMO, resolve
from farshore.models.tokenizer.load import load_tokenizer
from farshore.proto import inference_pb2 as api
from farshore.workers.engine.constraints.grammar import Grammar, GrammarCompiler

MOST_MASK_US = 100.0
MOST_TOKENS = 200
"""Length of one text."""
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "kind": {"enum": ["person", "place", "thing"]},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 4},
    },
    "required": ["name", "kind", "code", "age", "tags"],
    "additionalProperties": False,
    "$defs": {"tag": {"anyOf": [{"type": "string", "maxLength": 12}, {"type": "number"}]}},
}


STRUCTURES = {
    "schema": api.Structure(json_schema=json.dumps(SCHEMA)),
    "regex": api.Structure(regex=r"([A-Z][a-z]{2,9} ){3,8}[0-9]{4}-[0-9]{2}-[0-9]{2}"),
    "choice": api.Structure(
        choice=api.Choices(texts=[f"department {number} of the ministry" for number in range(200)])
    ),
    "grammar": api.Structure(
        grammar='start: sum\nsum: term (("+" | "-") term){1,12}\nterm: NUMBER | "(" NUMBER "*" NUMBER ")"\n'
        "NUMBER: /[0-9]{1,6}/"
    ),
}
"""One of each kind of structure, each with texts of dozens of tokens or with many texts."""


def measure(setting: Setting) -> Measured:
    """Walks through texts of each of STRUCTURES twice, and times the masks of the second walk."""
    tokenizer = load_tokenizer(resolve(DEMO))
    end = tokenizer.eos_ids[0]
    compiler = GrammarCompiler(lambda: tokenizer, vocab=tokenizer.vocab_size, eos_ids=[end])
    results, bars = [], []
    for kind, structure in STRUCTURES.items():
        compiled, draw = compiler.compile(grammar_of(structure)), random.Random(0)
        samples_s: list[float] = []
        while len(samples_s) < setting.sizes.masks:
            text = _drawn(compiled.copy(), end, draw)
            samples_s += _timed(compiled.copy(), text)
        mean_us = 1e6 * sum(samples_s) / len(samples_s)
        figures = {"mean_us": mean_us, "p99_us": 1e6 * float(np.percentile(samples_s, 99))}
        results.append(Result(f"masks, {kind}", Timing(tuple(samples_s)), figures))
        bars.append(Bar.at_most(f"masks, {kind}: mean of a token's", mean_us, MOST_MASK_US, "µs"))
    return results, bars


def _drawn(grammar: Grammar, end: int, draw: random.Random) -> list[int]:
    """A text of at most MOST_TOKENS tokens."""
    tokens: list[int] = []
    while len(tokens) < MOST_TOKENS:
        token = draw.choice(np.flatnonzero(grammar.mask(tokens, 0)).tolist())
        if token == end:
            break
        tokens.append(token)
    return tokens


def _timed(grammar: Grammar, text: list[int]) -> list[float]:
    """CPU seconds of the mask before each token of ``text``, and of the one behind it."""
    samples_s = []
    for length in range(len(text) + 1):
        tokens = text[:length]
        begun_s = time.thread_time()
        grammar.mask(tokens, 0)
        samples_s.append(time.thread_time() - begun_s)
    return samples_s
