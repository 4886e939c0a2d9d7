"""Builds a tokenizer from a Hugging Face directory.

Called by ``load``. It must not know about weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from farshore.errors import ModelError
from farshore.models.files.source import read_json
from farshore.models.tokenizer.tokenizer import SPECIAL, Tokenizer


def from_hf(folder: Path, name: str) -> Tokenizer:
    """Reads ``tokenizer.json`` and, if present, ``tokenizer_config.json`` and the files of chat
    templates. Raises ModelError."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{folder}: no tokenizer.json; save the model's fast tokenizer with transformers")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(f"{path}: not a readable tokenizer; download it again") from error
    settings = folder / "tokenizer_config.json"
    config = read_json(settings) if settings.is_file() else {}
    special = {role: text for role in SPECIAL if (text := _content(config.get(role))) is not None}
    eos = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return Tokenizer(
        backend,
        name=name,
        special_tokens=special,
        eos_ids=() if eos is None else (eos,),
        chat_template=_templates(folder, config),
    )


def _templates(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template, or several by name: those in files of their own, or else the configuration's."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if texts := {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}:
        return texts
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        return {name: text for name, text in named.items() if isinstance(name, str) and isinstance(text, str)}
    return template if isinstance(template, str) else None


def _content(entry: Any) -> str | None:
    """The text of a special token, which is a string or an object with 'content'; None if it is neither."""
    text = entry.get("content") if isinstance(entry, Mapping) else entry
    return text if isinstance(text, str) else None
