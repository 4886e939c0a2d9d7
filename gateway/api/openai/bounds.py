"""The bounds that the OpenAPI description tells: those that ``gateway.requests`` and ``translate`` check.

Added by ``endpoints`` to the schemas of the bodies. Bounds that depend on other fields are not told. Must not
know how a bound is checked.
"""

from typing import Any

from farshore.gateway.limits import Limits
from farshore.gateway.served import Served
from farshore.sampling import BIASES, RANGES


def add_bounds(schemas: dict[str, Any], served: Served, limits: Limits) -> None:
    """Adds the bounds of ``served`` to ``schemas``, by name."""
    for schema in schemas.values():
        # An unknown field is an error that names it.
        if schema.get("type") == "object":
            schema["additionalProperties"] = False
    for name, fields in _fields(served, limits).items():
        for field, keywords in fields.items():
            for choice in _choices(schemas[name]["properties"][field]):
                choice.update(keywords.get(choice.get("type"), {}))


def _fields(served: Served, limits: Limits) -> dict[str, dict[str, dict[str, Any]]]:
    """Schema -> field -> JSON type -> keywords."""
    ids = {"integer": {"minimum": 0, "maximum": served.config.vocab - 1}}
    model = {"string": {"enum": ["", *served.spec.names]}}
    some = {"array": {"minItems": 1}}
    common: dict[str, dict[str, Any]] = {
        name: {
            "number": {
                "exclusiveMinimum" if allowed.above else "minimum": allowed.low,
                "maximum": allowed.high,
            }
        }
        for name, allowed in RANGES.items()
    }
    common |= {
        "model": model,
        "n": {"integer": {"minimum": 1, "maximum": limits.choices}},
        "priority": {"integer": {"minimum": -(1 << 31), "maximum": (1 << 31) - 1}},
        "prompt_logprobs": {"integer": {"maximum": limits.logprobs}},
        "stop": {
            "string": {"minLength": 1, "maxLength": limits.stop_chars},
            "array": {"maxItems": limits.stops},
        },
        "stop_token_ids": {"array": {"maxItems": limits.stop_token_ids, "items": _typed(ids)}},
        "allowed_token_ids": {"array": {"maxItems": limits.allowed_token_ids, "items": _typed(ids)}},
        "bad_words": {
            "array": {
                "maxItems": limits.bad_words,
                "items": {"type": "string", "minLength": 1, "maxLength": limits.bad_word_chars},
            }
        },
        "logit_bias": {
            "object": {
                "maxProperties": limits.logit_biases,
                "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,3})$"},
                "additionalProperties": {"type": "number", "minimum": BIASES.low, "maximum": BIASES.high},
            }
        },
        "max_tokens": {"integer": {"minimum": 1}},
        "truncate_prompt_tokens": {"integer": {"minimum": 1, "maximum": served.config.max_positions}},
    }
    return {
        "ChatBody": {
            **common,
            "messages": some,
            "max_completion_tokens": {"integer": {"minimum": 1}},
            "top_logprobs": {"integer": {"maximum": limits.logprobs}},
        },
        "CompletionBody": {
            **common,
            "prompt": {"string": {"minLength": 1}} | some,
            "logprobs": {"integer": {"maximum": limits.logprobs}},
        },
        "ChatMessage": {"role": {"string": {"minLength": 1, "maxLength": limits.role_chars}}},
        "TokenizeBody": {"model": model, "messages": some},
        "DetokenizeBody": {"model": model, "tokens": {"array": {"items": _typed(ids)}}},
    }


def _typed(keywords: dict[str, Any]) -> dict[str, Any]:
    ((kind, bounds),) = keywords.items()
    return {"type": kind, **bounds}


def _choices(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return schema.get("anyOf", [schema])
