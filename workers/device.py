"""Chooses the device of a worker: the one place that turns ``--device`` into a device of PyTorch.

Called by the workers' actors with what Ray gave them, by ``python -m farshore.workers.attention``, and by the
driver, which refuses what its own host can't do before it starts anything. The choice is a pure function of
facts. It must not know Ray, models or stores.
"""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from farshore.errors import InvalidRequest
from farshore.kernels.host import HOST

VISIBLE = "CUDA_VISIBLE_DEVICES"
_DRIVER = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""One of these exists where NVIDIA's driver does; the last one is of Windows' Linux."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What this process knows of GPUs."""

    built_for: str | None
    """The version of CUDA that PyTorch was built for; None: it has no CUDA."""
    gpus: tuple[str, ...] = ()
    """The visible GPUs in words, such as ``NVIDIA H200, 139 GiB``, in the order of their indices."""
    visible: str | None = None
    """CUDA_VISIBLE_DEVICES; None if it is not set."""
    has_driver: bool = False
    complaint: str = ""
    """Why PyTorch finds no GPU, in its own words."""


class Device(NamedTuple):
    """Where a worker computes and keeps its KV, and why there: a GPU's name, or what kept ``auto`` from one.
    ``why`` is empty where the CPU was asked for."""

    torch: torch.device
    why: str = ""

    def __str__(self) -> str:
        """For logs and ``farshore status``: ``cpu: torch was built without CUDA``."""
        return f"{self.torch.type}: {self.why}" if self.why else self.torch.type


CPU = Device(HOST)


def resolve(asked: str, *, option: str = "--device", granted: int | None = None) -> Device:
    """As :func:`choose`, by the facts of this process. A GPU is opened only where a worker may take one."""
    if asked == "cpu":
        return CPU
    return choose(asked, look(described=granted != 0), option=option, granted=granted)


def choose(asked: str, facts: Facts, *, option: str = "--device", granted: int | None = None) -> Device:
    """The device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, where N is an index among the visible GPUs.
    ``granted``: the GPUs that Ray gave to this worker; None outside of Ray.

    Raises InvalidRequest, one line with the fix, for another word, and for a GPU that is not there.
    """
    kind, colon, number = asked.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (colon and not (kind == "cuda" and number.isdecimal())):
        raise InvalidRequest(f"{option} {asked}: use auto, cpu, cuda or cuda:N")
    if kind == "cpu":
        return CPU
    lacking = _lacking(facts, granted)
    if kind == "auto":
        return Device(HOST, lacking[0]) if lacking else Device(torch.device("cuda", 0), facts.gpus[0])
    if lacking:
        raise InvalidRequest(f"{option} {asked}: {lacking[0]}: {lacking[1]}, or use {option} cpu")
    index, count = int(number or 0), len(facts.gpus)
    if index >= count:
        raise InvalidRequest(
            f"{option} {asked}: {count} GPU{'s are' if count > 1 else ' is'} visible here: use cuda:0"
            f"{f' to cuda:{count - 1}' if count > 1 else ''}, or show more by {VISIBLE}"
        )
    return Device(torch.device("cuda", index), facts.gpus[index])


def look(*, described: bool = True) -> Facts:
    """The facts of this process. ``described``: with names and sizes of the GPUs, for which PyTorch opens
    them and takes some of their memory; else ``gpus`` has one empty text each."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    complaints = [str(each.message).partition("\n")[0] for each in said]
    return Facts(
        built_for=torch.version.cuda,
        gpus=tuple(_described(index) if described else "" for index in range(count)),
        visible=os.environ.get(VISIBLE),
        has_driver=any(path.exists() for path in _DRIVER),
        complaint=complaints[0] if complaints else "",
    )


def _lacking(facts: Facts, granted: int | None) -> tuple[str, str] | None:
    """What keeps a worker from using a GPU, and the fix; None if nothing does."""
    if facts.built_for is None:
        return "torch was built without CUDA", "install PyTorch's build for CUDA (docs/accelerators.md)"
    if not facts.gpus:
        if not facts.has_driver:
            return "no NVIDIA driver is here", "install it, and see that nvidia-smi lists the GPU"
        if facts.visible is not None:
            return f"{VISIBLE}={facts.visible} shows no GPU", f"unset {VISIBLE}, or name a GPU in it"
        why = f" ({facts.complaint})" if facts.complaint else ""
        return f"torch finds no GPU{why}", "see what nvidia-smi says"
    if granted == 0:
        return "Ray gave this worker no GPU", "ask Ray for one"
    return None


def _described(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name}, {properties.total_memory / (1 << 30):.0f} GiB"
