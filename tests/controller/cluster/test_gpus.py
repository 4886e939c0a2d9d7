"""Workers that ask a real Ray for GPUs, which it only believes to have."""

import os
import subprocess
import sys

import pytest
import torch

DEADLINE_S = 600

CODE = """
import ray
ray.init(
    address="local", include_dashboard=False, object_store_memory=80 << 20, logging_level="ERROR",
    num_gpus=1, _memory=16 << 30,
)
import tempfile, time
from farshore.cluster_token import ClusterToken
from farshore.controller.config import ClusterConfig
from farshore.controller.controller import Controller
from farshore.models.config.load import load_config
from farshore.models.files.source import resolve

def controller(**options):
    return Controller(
        ClusterConfig(
            kv_memory_bytes=64 << 20,
            attention_workers=1,
            token_file=str(ClusterToken.make(tempfile.mkdtemp() + "/token").path),
            **options,
        ),
        load_config(resolve("smollm2")),
        given=(),
        listen="127.0.0.1:0",
        state_folder=tempfile.mkdtemp(),
        restarted=False,
    )

def until(result):
    end_s = time.monotonic() + 250
    while not (found := result()):
        assert time.monotonic() < end_s
        time.sleep(0.05)
    return found

# One GPU for one dense worker: auto takes it, and says that PyTorch can't.
made = controller(name="auto")
assert made.problem(free=False) is None
devices = lambda: {each.kind: each.device for each in made._directory.listing().workers}
found = until(lambda: len(devices()) == 2 and devices())
assert found == {"dense": "cpu: torch was built without CUDA", "attention": "cpu"}, found
until(lambda: ray.available_resources().get("GPU", 0) == 0)
made.down()
until(lambda: ray.available_resources().get("GPU", 0) == 1)

# Two dense workers: the second waits for a GPU, the first says why it can't use its own.
made = controller(name="two", device="cuda", dense_workers=2)
problem = made.problem(free=False)
for part in ("2 dense workers with 4,096 MiB of memory and a GPU each", "and 1 GPU on ", "use --device cpu"):
    assert part in problem, problem
lost = until(lambda: [each.detail for each in made.events.since(0) if each.kind == "lost"])
assert "could not start: --device cuda: torch was built without CUDA: install" in lost[0], lost
made.down()
ray.shutdown()
print("fine")
"""


@pytest.mark.heavy
@pytest.mark.skipif(torch.version.cuda is not None, reason="Ray's GPU would be taken for a real one")
def test_workers_get_gpus_of_ray_or_say_why_not(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", CODE],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.strip().endswith("fine"), done.stdout + done.stderr
