"""Which keywords of JSON Schema a structure may use. docs/structured-output.md lists them.

Called by ``structure``. llguidance refuses the standard's keywords that it does not support, and ignores
those that it does not know: a misspelt one would change nothing. Must not know about grammars.
"""

from collections.abc import Iterator
from typing import Any

from farshore.errors import InvalidRequest
from farshore.text import quoted

_SCHEMA = {"items", "additionalProperties", "additionalItems"}
"""Keywords whose value is a schema."""
_SCHEMAS = {"anyOf", "oneOf", "allOf", "prefixItems"}
"""A list of schemas."""
_NAMED = {"properties", "patternProperties", "$defs", "definitions"}
"""Schemas by name."""
_VALUES = {
    *("type", "enum", "const", "$ref", "required", "minProperties", "maxProperties", "minItems", "maxItems"),
    *("minLength", "maxLength", "pattern", "format"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
_NOTES = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator"),
    *("$schema", "$id", "$anchor", "$comment", "contentEncoding", "contentMediaType"),
}
"""These change nothing about what is valid."""
KEYWORDS = frozenset(_SCHEMA | _SCHEMAS | _NAMED | _VALUES | _NOTES)


def check_keywords(schema: dict[str, Any] | bool) -> None:
    """Raises InvalidRequest for the first keyword that is not in KEYWORDS, with its name."""
    waiting: list[Any] = [schema]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            for keyword in one:
                if keyword not in KEYWORDS:
                    raise InvalidRequest(
                        f"the JSON schema's keyword {quoted(keyword)} is not supported: leave it out",
                        field="sampling.structure",
                    )
            waiting += _inside(one)


def _inside(schema: dict[str, Any]) -> Iterator[Any]:
    """The schemas within a schema. Values of another form are llguidance's to refuse."""
    for keyword, value in schema.items():
        if keyword in _SCHEMA:
            yield from value if isinstance(value, list) else (value,)
        elif keyword in _SCHEMAS and isinstance(value, list):
            yield from value
        elif keyword in _NAMED and isinstance(value, dict):
            yield from value.values()
