"""Translates the structure that a text must follow into a grammar for the engine, and checks it.

Called by ``validate``. llguidance bounds its own work, and takes milliseconds for what it accepts; it refuses
by name what it does not support. Must not know how a grammar is applied.
"""

import json

from llguidance import LLMatcher, LLParserLimits

from farshore.errors import InvalidRequest
from farshore.gateway.limits import Limits
from farshore.gateway.requests.json_schema import check_keywords
from farshore.proto import inference_pb2 as api
from farshore.text import shortened

_LIMITS = LLParserLimits(verbose_errors=False)

_WHITESPACE = r"[ \t\n\r]{1,20}"
"""Between the tokens of JSON. Without a bound a small model may write blanks for ever."""


def check(sampling: api.Sampling, limits: Limits) -> None:
    """The checks that cost nothing. Raises InvalidRequest."""
    kind = sampling.structure.WhichOneof("kind")
    if kind is None:
        if sampling.HasField("structure"):
            raise InvalidRequest(
                "structure is empty: give json_schema, regex, choice or grammar", field="sampling.structure"
            )
        return
    if sampling.ignore_eos:
        raise InvalidRequest(
            "ignore_eos and a structure exclude one another: a structured text ends by itself",
            field="sampling.ignore_eos",
        )
    chars = len(_source(sampling.structure))
    if chars > limits.structure_chars:
        raise InvalidRequest(
            f"the structure has {chars} characters: use at most {limits.structure_chars}",
            field="sampling.structure",
        )
    if kind == "choice":
        texts = sampling.structure.choice.texts
        if not texts or not all(texts):
            raise InvalidRequest(
                "choice needs at least one text, and none of them empty", field="sampling.structure"
            )


def grammar_of(structure: api.Structure) -> str:
    """The grammar in llguidance's form; empty for no structure. Takes milliseconds, for large structures a
    tenth of a second: call it in a thread. Raises InvalidRequest, with the name of what is not supported."""
    kind = structure.WhichOneof("kind")
    if kind is None:
        return ""
    try:
        grammar = _grammar(kind, structure)
        problem = LLMatcher.validate_grammar(grammar, None, limits=_LIMITS)
    except (ValueError, RecursionError) as error:
        problem = str(error)
    if problem:
        raise InvalidRequest(f"{kind} can't be used: {shortened(problem)}", field="sampling.structure")
    return grammar


def _grammar(kind: str, structure: api.Structure) -> str:
    if kind == "json_schema":
        schema = json.loads(structure.json_schema)
        if not isinstance(schema, dict | bool):
            raise ValueError("a JSON schema is an object")
        check_keywords(schema)
        return LLMatcher.grammar_from_json_schema(
            structure.json_schema,
            defaults={"whitespace_pattern": _WHITESPACE},
            # A schema's own x-guidance could set it: what is not supported would be ignored silently.
            overrides={"lenient": False},
        )
    if kind == "regex":
        return LLMatcher.grammar_from_regex(structure.regex)
    if kind == "choice":
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in structure.choice.texts)
        return LLMatcher.grammar_from_lark(f"start: {texts}")
    return LLMatcher.grammar_from_lark(structure.grammar)


def _source(structure: api.Structure) -> str:
    kind = structure.WhichOneof("kind")
    return "".join(structure.choice.texts) if kind == "choice" else getattr(structure, kind)
