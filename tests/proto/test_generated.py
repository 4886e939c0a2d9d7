"""The committed stubs are what the .proto files say today, and run with the oldest packages we promise.

No comparison is by the text of the stubs: that changes with each release of grpcio-tools.
"""

import ast
import importlib
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

ROOT = Path(__file__).resolve().parents[2]
PROTO = ROOT / "proto"
NAMES = sorted(path.stem for path in PROTO.glob("*.proto"))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A folder of stubs that the installed tools write."""
    spec = importlib.util.spec_from_file_location("generate", PROTO / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("fresh")
    module.generate(folder)
    return folder


def _descriptor(stub):
    """The file descriptor that a stub of messages registers."""
    blobs = [
        ast.literal_eval(call.args[0])
        for call in ast.walk(ast.parse(stub.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "AddSerializedFile"
    ]
    (blob,) = blobs
    return descriptor_pb2.FileDescriptorProto.FromString(blob)


def _shape(source):
    """Every class with its base classes, methods and annotated fields."""
    return {
        node.name: (
            {base for base in map(ast.unparse, node.bases) if base != "object"},
            {item.name for item in node.body if isinstance(item, ast.FunctionDef)},
            {ast.unparse(item.target) for item in node.body if isinstance(item, ast.AnnAssign)},
        )
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
    }


def test_every_proto_has_its_stubs(fresh):
    assert {path.name for path in fresh.iterdir()} == {path.name for path in PROTO.glob("*_pb2*")}


@pytest.mark.parametrize("name", NAMES)
def test_generated_code_is_not_stale(fresh, name):
    stale = f"{name}.proto has changed: run proto/generate.py"
    assert _descriptor(PROTO / f"{name}_pb2.py") == _descriptor(fresh / f"{name}_pb2.py"), stale
    for file in (f"{name}_pb2.pyi", f"{name}_pb2_grpc.py"):
        assert _shape((PROTO / file).read_text()) == _shape((fresh / file).read_text()), stale


def _minima():
    """Package -> its lowest version in pyproject.toml, as numbers."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found = (re.match(r"([\w.-]+)(?:\[\w+\])?>=([\d.]+)", line) for line in dependencies)
    return {match[1]: _numbers(match[2]) for match in found if match}


def _numbers(version):
    return tuple(map(int, version.split("."))) + (0,) * (2 - version.count("."))


@pytest.mark.parametrize("name", NAMES)
def test_stubs_run_with_the_lowest_versions(name):
    stubs = [(PROTO / f"{name}{suffix}.py").read_text() for suffix in ("_pb2", "_pb2_grpc")]
    messages = re.search(r"Protobuf Python Version: ([\d.]+)", stubs[0])
    services = re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", stubs[1])
    newer = "generated with newer tools than proto/generate.py names"
    minima = _minima()
    assert _numbers(messages[1]) <= minima["protobuf"], newer
    assert _numbers(services[1]) <= minima["grpcio"], newer
