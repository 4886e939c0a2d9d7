"""null takes a value's default away: Helm then refuses it by its name, or the chart does without."""

import copy
import json
from pathlib import Path

import pytest

SCHEMA = json.loads((Path(__file__).parents[2] / "helm" / "farshore" / "values.schema.json").read_text())

EVERYTHING = {
    "image": {"repository": "registry.example.com/farshore"},
    "model": {"source": "init", "init": {"image": "busybox", "command": ["cp", "a", "/models"]}},
    "dense": {"replicas": 2, "gpu": {"enabled": True}},
    "gateway": {"autoscaling": {"enabled": True}},
    "ingress": {kind: {"enabled": True, "host": f"{kind}.example.com"} for kind in ("grpc", "http")},
}
REDIS = {
    "embedded": {},
    "bundled": {"redis": {"mode": "bundled"}},
    "external": {"redis": {"mode": "external", "external": {"url": "redis://redis.example.com"}}},
}


def resolved(part):
    """A part of the schema with what it refers to; without its conditions."""
    while "$ref" in part:
        part = SCHEMA["$defs"][part["$ref"].rpartition("/")[2]]
    for each in part.get("allOf", ()):
        if "if" not in each:
            each = resolved(each)
            part = each | part | {"required": [*part.get("required", ()), *each.get("required", ())]}
    return part


def optional(values, part, path=()):
    """The paths of all values that null may take away, the outermost ones."""
    part = resolved(part)
    for key, value in values.items():
        if key not in part.get("required", ()):
            yield (*path, key)
        elif isinstance(value, dict):
            yield from optional(value, part.get("properties", {}).get(key, {}), (*path, key))


def required(values, part, path=()):
    part = resolved(part)
    for key, value in values.items():
        if key in part.get("required", ()):
            yield (*path, key)
        if isinstance(value, dict):
            yield from required(value, part.get("properties", {}).get(key, {}), (*path, key))


def without(values, path):
    result = copy.deepcopy(values)
    at = result
    for key in path[:-1]:
        at = at.setdefault(key, {})
    at[path[-1]] = None
    return result


def nulls(value, path=""):
    if isinstance(value, dict):
        for key, each in value.items():
            yield from nulls(each, f"{path}.{key}")
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from nulls(each, f"{path}[{number}]")
    elif value is None or (isinstance(value, str) and ("<nil>" in value or "<no value>" in value)):
        yield path


@pytest.mark.parametrize("mode", REDIS)
def test_what_is_not_required_can_be_taken_away(render, merged, defaults, mode):
    given = merged(EVERYTHING, REDIS[mode])
    values = given
    used = {".".join(path) for path in leaves(given)}
    for path in optional(defaults, SCHEMA):
        if ".".join(path) not in used and path[0] != "spec":
            values = without(values, path)
    for (kind, name), each in render(values).items():
        assert list(nulls(each)) == [], (kind, name)


def leaves(values, path=()):
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


def test_what_is_required_is_refused_by_its_name(call_helm, helm_failed, defaults):
    values = EVERYTHING
    paths = list(required(defaults, SCHEMA))
    assert len(paths) > 80
    # The innermost ones, all at once: Helm names each.
    inner = [path for path in paths if not any(other[:-1] == path for other in paths)]
    for path in inner:
        values = without(values, path)
    with pytest.raises(helm_failed) as refused:
        call_helm("render", values=values, name="demo", namespace="llm")
    said = str(refused.value)
    assert [path for path in inner if f"'{path[-1]}'" not in said] == []
