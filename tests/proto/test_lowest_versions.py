"""The lowest grpcio and protobuf that pyproject.toml allows, installed: the stubs answer a call."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("grpcio", "grpcio-health-checking", "grpcio-reflection", "protobuf")

CALL = """
import sys, importlib.metadata
import grpc
from farshore import rpc
from farshore.proto import admin_pb2, admin_pb2_grpc, attention_pb2_grpc, cluster_pb2_grpc, inference_pb2_grpc

class Admin(admin_pb2_grpc.AdminServiceServicer):
    def Scale(self, request, context):
        return admin_pb2.ScaleResponse(attention_workers=request.attention_workers)

server, address = rpc.serve(
    lambda server: admin_pb2_grpc.add_AdminServiceServicer_to_server(Admin(), server),
    service="farshore.admin.v1.AdminService", listen="127.0.0.1:0", threads=2, token=None,
)
with grpc.insecure_channel(address, options=rpc.OPTIONS) as channel:
    stub = admin_pb2_grpc.AdminServiceStub(channel)
    assert stub.Scale(admin_pb2.ScaleRequest(attention_workers=3), timeout=30).attention_workers == 3
server.stop(0).wait()
print(*(f"{name}=={importlib.metadata.version(name)}" for name in sys.argv[1:]))
"""


def _lowest():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found = {match[1]: match[2] for line in dependencies if (match := re.match(r"([\w-]+)>=([\d.]+)", line))}
    return [f"{name}=={found[name] + '.0' * (2 - found[name].count('.'))}" for name in PACKAGES]


@pytest.mark.heavy
def test_the_lowest_versions_serve_a_call(tmp_path, new_environment):
    python = new_environment(tmp_path, *_lowest())
    # As in site-packages: the package beside nothing else of ours, and no numpy, torch or Ray.
    package = tmp_path / "package" / "farshore"
    package.parent.mkdir()
    package.mkdir()
    for file in (ROOT / "farshore").glob("*.py"):
        (package / file.name).symlink_to(file)
    (package / "proto").symlink_to(ROOT / "proto")
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    call = subprocess.run(
        [python, "-W", "error", "-c", CALL, *PACKAGES],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=environment,
    )
    assert call.returncode == 0, call.stderr
    assert call.stdout.split() == _lowest()
