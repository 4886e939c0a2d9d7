"""RayRuntime with real Rays, each in a process: a private Ray is private, another program's Ray is
untouched."""

import os
import subprocess
import sys

import pytest
import ray

from farshore.controller.driver.ray_runtime import RayRuntime
from farshore.errors import StartupError

DEADLINE_S = 600

PRIVATE = """
import os, stat
import grpc, ray, psutil
from farshore.controller.driver.ray_runtime import RayRuntime

def is_refused(address, metadata):
    with grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
        try:
            ask(b"", metadata=metadata, timeout=60)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED, error
            return True
    return False

@ray.remote(num_cpus=0)
class Actor:
    def environment(self):
        return dict(os.environ)

for _ in range(2):  # A Ray that was stopped leaves nothing that breaks the next one.
    runtime = RayRuntime(None, dashboard=False)
    runtime.start()
    assert not [name for name in os.environ if "AUTH" in name], "not for this program's own children"
    path = ray.get(Actor.remote().environment.remote())["RAY_AUTH_TOKEN_PATH"]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
    address = ray.get_runtime_context().gcs_address
    token = open(path).read()
    assert not is_refused(address, [("authorization", f"Bearer {token}")])
    for metadata in ([], [("authorization", f"Bearer {'0' * len(token)}")]):
        assert is_refused(address, metadata)
    runtime.note_processes()
    family = list(runtime._processes)
    assert {"raylet", "gcs_server"} <= {process.name() for process in family}
    mine = {process.pid for process in family} | {os.getpid()}
    listening = [c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.pid in mine]
    assert listening
    assert {c.laddr.ip for c in listening} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    runtime.stop()
    assert not os.path.exists(path)
    assert not [process for process in family if process.is_running()]
    assert not ray.is_initialized()
print("fine")
"""

IN_USE = """
import os
import ray
ray.init(address="local", include_dashboard=False, object_store_memory=80 << 20, logging_level="ERROR")

@ray.remote(num_cpus=0)
class Actor:
    def answer(self):
        return 42

actor = Actor.remote()

from farshore.cluster_token import ClusterToken
from farshore.controller.driver.cluster import Cluster
from farshore.controller.config import ClusterConfig
from farshore.errors import StartupError

token = str(ClusterToken.make("token").path)
for address in (None, ray.get_runtime_context().gcs_address):
    try:
        config = ClusterConfig(port=0, ray_address=address, token_file=token if address else None)
        Cluster.start(config, progress=lambda _: None)
    except StartupError as error:
        assert "this program uses Ray already" in str(error) and "farshore serve" in str(error)
    else:
        raise AssertionError("it started")
    assert ray.get(actor.answer.remote(), timeout=250) == 42
ray.shutdown()
print("fine")
"""

WITHOUT_MEMORY = """
import ray
ray.init(
    address="local", include_dashboard=False, object_store_memory=80 << 20, logging_level="ERROR",
    _memory=600 << 20,  # Enough for the dense worker.
)
import tempfile, time
from farshore.cluster_token import ClusterToken
from farshore.controller.config import ClusterConfig
from farshore.controller.controller import Controller
from farshore.models.config.load import load_config
from farshore.models.files.source import resolve

made = Controller(
    ClusterConfig(
        kv_memory_bytes=64 << 20,
        attention_workers=3,
        token_file=str(ClusterToken.make("token").path),
    ),
    load_config(resolve("smollm2")),
    given=(),
    listen="127.0.0.1:0",
    state_folder=tempfile.mkdtemp(),
    restarted=False,
)
end_s = time.monotonic() + 250
while (waiting := made.problem(free=True)) is None:
    assert time.monotonic() < end_s
for problem in (waiting, made.problem(free=False)):
    for part in ("384 MiB of memory", "do not fit: Ray has", " MiB on ", "--kv-memory"):
        assert part in problem, problem
made.down()
ray.shutdown()
print("fine")
"""


@pytest.mark.parametrize("kind", [Exception, RuntimeError])
def test_a_ray_that_does_not_start_in_time_is_one_line(monkeypatch, kind):
    """Ray itself waits for 30 s, and raises a plain Exception then."""

    def init(**options):
        raise kind("The current node timed out during startup.\nMore")

    monkeypatch.setattr(ray._private.worker, "print_to_stdstream", None)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(StartupError, match=r"^Ray did not start \(The current .* startup\.\): see [^\n]*$"):
        RayRuntime(None, dashboard=False).start()
    assert not ray.is_initialized()


@pytest.mark.heavy
@pytest.mark.parametrize("code", [PRIVATE, IN_USE, WITHOUT_MEMORY], ids=["private", "in use", "memory"])
def test_ray(code, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0 and done.stdout.strip().endswith("fine"), done.stdout + done.stderr
