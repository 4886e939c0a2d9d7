"""The OpenAPI description of the HTTP API, from the models of the bodies.

Served by ``endpoints`` as /openapi.json. Must not know how a call is handled.
"""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from farshore import __version__
from farshore.gateway.api.openai.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

_POSTS: dict[str, tuple[type[BaseModel], str]] = {
    "/v1/chat/completions": (ChatBody, "Answers a chat; a stream of server-sent events with stream: true."),
    "/v1/completions": (CompletionBody, "Continues one or more prompts."),
    "/tokenize": (TokenizeBody, "The token ids of a text or a chat."),
    "/detokenize": (DetokenizeBody, "The text of token ids."),
}
_GETS = {
    "/v1/models": "The served model, by each of its names.",
    "/v1/models/{model}": "One served model.",
    "/health": "200 while the gateway runs.",
    "/ready": "200 while an engine takes requests.",
    "/version": "Farshore's version.",
    "/openapi.json": "This description.",
    "/": "A page for browsers that shows the cluster, live.",
    "/status.json": "What the page shows: workers, memory, sequences, tokens per second, events.",
}
_ERRORS = {
    "/v1/chat/completions": (400, 404, 408, 409, 413, 415, 422, 429, 500, 503, 504),
    "/v1/completions": (400, 404, 408, 409, 413, 415, 422, 429, 500, 503, 504),
    "/tokenize": (400, 404, 408, 413, 415, 503),
    "/detokenize": (400, 404, 408, 413, 415),
    "/v1/models/{model}": (404,),
    "/ready": (503,),
    "/status.json": (503,),
}


def description() -> dict[str, Any]:
    """The OpenAPI 3.1 document, without the bounds that depend on a gateway."""
    kinds = [kind for kind, _ in _POSTS.values()]
    template = "#/components/schemas/{model}"
    _, schemas = models_json_schema([(kind, "validation") for kind in kinds], ref_template=template)
    paths: dict[str, Any] = {}
    for path, (kind, summary) in _POSTS.items():
        content = {"application/json": {"schema": {"$ref": template.format(model=kind.__name__)}}}
        paths[path] = {
            "post": {
                "summary": summary,
                "requestBody": {"required": True, "content": content},
                "responses": _responses(path),
            }
        }
    for path, summary in _GETS.items():
        operation: dict[str, Any] = {"summary": summary, "responses": _responses(path)}
        if "{model}" in path:
            operation["parameters"] = [
                {
                    "name": "model",
                    "in": "path",
                    "required": True,
                    "schema": {"type": "string", "minLength": 1},
                }
            ]
        paths[path] = {"get": operation}
    error = {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Farshore", "version": __version__},
        "paths": paths,
        "components": {"schemas": {**schemas["$defs"], "Error": error}},
    }


def _responses(path: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    refusals = {
        str(status): {"description": "See the message.", "content": content}
        for status in _ERRORS.get(path, ())
    }
    return {"200": {"description": "Success."}, **refusals}
