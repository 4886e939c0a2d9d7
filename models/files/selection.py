"""Which of a repository's or a folder's files a model consists of, by their names alone.

Called by ``source`` for local folders and by ``hub`` for lists of files. It must not read files or know where
they are.
"""

import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from farshore.errors import ModelError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
SETTINGS = (CONFIG, GENERATION_CONFIG)
TOKENIZER = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
"""Patterns of the files that transformers reads for a fast or a SentencePiece tokenizer."""
VOCABULARIES = ("tokenizer.json", "tokenizer.model")
"""A tokenizer needs at least one of these."""

_MOST_LISTED = 8
_PART = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf", re.IGNORECASE)
"""A file of a split GGUF model, as llama-gguf-split names it."""


def small_files(names: Iterable[str], *, tokenizer_only: bool) -> list[str]:
    """The names of configurations and of the tokenizer's files; or of the tokenizer's and config.json."""
    patterns = (*((CONFIG,) if tokenizer_only else SETTINGS), *TOKENIZER)
    return sorted(
        name
        for name in names
        if any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)
        and name != INDEX
    )


def has_vocabulary(names: Collection[str]) -> bool:
    """Whether a tokenizer can be among ``names``."""
    return any(name in names for name in VOCABULARIES)


def part_number(name: str) -> int | None:
    """The number of this file in a split GGUF model, from 1; None if its name is of no split model."""
    match = _PART.fullmatch(name)
    return None if match is None else int(match["part"])


def gguf_parts(name: str) -> list[str]:
    """The names of all parts of the GGUF model that ``name`` is a file of, in order; ``[name]`` for a model
    in one file."""
    match = _PART.fullmatch(name)
    if match is None:
        return [name]
    parts, extension = int(match["parts"]), name[match.end("parts") :]
    return [f"{match['stem']}-{part:05}-of-{parts:05}{extension}" for part in range(1, parts + 1)]


def gguf_models(names: Iterable[str]) -> list[str]:
    """The first file of every GGUF model among ``names``, sorted. A multimodal projector is no model."""
    files = (name for name in names if name.lower().endswith(".gguf"))
    models = {gguf_parts(name)[0] for name in files if "mmproj" not in name.lower()}
    return sorted(models)


def pick_gguf(names: Iterable[str], tag: str | None, *, where: str, fix: str) -> str:
    """The first file of the one GGUF model whose name contains ``tag``: a quantisation such as ``Q4_K_M`` in
    any case, between separators, or a whole file name. None: of the only one.

    Raises ModelError, which starts with ``where`` and lists the models, if there is none or several. ``fix``:
    what the user can do if there are several and no tag.
    """
    models = gguf_models(names)
    if not models:
        raise ModelError(f"{where}: holds no .gguf file; leave the part after the colon out")
    found = models if tag is None else [model for model in models if _matches(model, tag)]
    if len(found) == 1:
        return found[0]
    if tag is None:
        raise ModelError(f"{where}: holds several GGUF models: {_listed(models)}; {fix}")
    if not found:
        raise ModelError(f"{where}: no GGUF model has {tag!r} in its name; it holds {_listed(models)}")
    raise ModelError(
        f"{where}: {tag!r} is in the names of several GGUF models: {_listed(found)};"
        " give the whole name of one file instead"
    )


def no_weights(names: Collection[str], *, where: str) -> ModelError:
    """The error of a repository or folder without weights that can be loaded."""
    if "adapter_config.json" in names:
        return ModelError(
            f"{where}: a LoRA adapter, which is unsupported; merge it into its base model with peft's"
            " merge_and_unload, and serve the result"
        )
    kinds = [suffix for suffix in (".bin", ".pt", ".pth", ".h5") if any(n.endswith(suffix) for n in names)]
    found = f" (only weights as *{kinds[0]}, which are not read)" if kinds else ""
    return ModelError(
        f"{where}: has no *.safetensors{found}; convert it with transformers' save_pretrained, or use"
        " another copy"
    )


def _matches(model: str, tag: str) -> bool:
    if tag in gguf_parts(model) or tag in [part.rpartition("/")[2] for part in gguf_parts(model)]:
        return True
    return re.search(rf"(?<![A-Z0-9]){re.escape(tag.upper())}(?![A-Z0-9_])", model.upper()) is not None


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + more
