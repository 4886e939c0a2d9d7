"""Builds a tokenizer from a Hugging Face folder, as transformers' AutoTokenizer does.

``tokenizer.json``, or else SentencePiece's ``tokenizer.model``; the files beside them say which tokens are
special and how chats are written. Called by ``load``. It must not know about weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, models, processors

from farshore.errors import ModelError
from farshore.models.files.source import read_json
from farshore.models.tokenizer import hf_class, sentencepiece
from farshore.models.tokenizer.hf_class import GENERAL, LLAMA, TokenizerClass
from farshore.models.tokenizer.hf_settings import HfSettings, Token
from farshore.models.tokenizer.sentencepiece_file import SentencePieceFile
from farshore.models.tokenizer.tokenizer import Tokenizer

_CONVERT = "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"


def from_hf(path: Path, name: str) -> Tokenizer:
    """``path``: a folder with ``tokenizer.json`` or ``tokenizer.model`` and the files beside it, or a
    ``tokenizer.json`` by itself, which then has no special roles and no chat template. Raises ModelError."""
    if path.is_file():
        return Tokenizer(_read(path), name=name, special_tokens={}, eos_ids=(), chat_template=None)
    file = path / "tokenizer.json"
    backend = _read(file) if file.is_file() else None
    settings = HfSettings.read(path, backend)
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    byte_level = backend is not None and '"ByteLevel"' in _read_text(file)
    chosen = hf_class.choose(path, config, settings.options, byte_level=byte_level)
    if backend is None:
        backend = _from_sentencepiece(path, chosen, settings)
    else:
        if backend.padding and "pad_token" not in chosen.defaults:
            settings.roles.setdefault("pad_token", backend.padding["pad_token"])
        backend = hf_class.rebuilt(backend, chosen, settings.options, file)
    roles = settings.named(chosen.defaults)
    _add_tokens(backend, settings, roles, resets_flags=chosen.resets_flags)
    if not file.is_file():
        _add_around(backend, settings.options, roles)
    _refuse_unsupported(path, config, settings.options, backend)
    backend.encode_special_tokens = bool(settings.options.get("split_special_tokens"))
    eos = backend.token_to_id(str(roles["eos_token"])) if "eos_token" in roles else None
    return Tokenizer(
        backend,
        name=name,
        special_tokens={role: str(token) for role, token in roles.items()},
        eos_ids=() if eos is None else (eos,),
        chat_template=_template_text(path, settings.options),
    )


def _read(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(f"{path}: not a readable tokenizer; download it again") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: can't be read as UTF-8 text; download it again") from error


def _from_sentencepiece(folder: Path, chosen: TokenizerClass, settings: HfSettings) -> tokenizers.Tokenizer:
    """Also completes ``settings`` with what the file says about special tokens."""
    path = folder / "tokenizer.model"
    if not path.is_file():
        for other in ("tekken.json", "tiktoken.model"):
            if (folder / other).is_file():
                raise ModelError(f"{folder}: {other} alone is unsupported; convert it: {_CONVERT}")
        raise ModelError(
            f"{folder}: no tokenizer.json and no tokenizer.model; save the model's fast tokenizer with "
            "transformers"
        )
    file = SentencePieceFile.read(path)
    if chosen is LLAMA:
        settings.old_extra = sentencepiece.whole_pieces(file, user_defined=True)
        return chosen.build(sentencepiece.llama_model(file), settings.options)
    if chosen is not GENERAL:
        raise ModelError(
            f"{folder}: tokenizer_class {chosen.name} can't read tokenizer.model; get the tokenizer.json"
        )
    settings.old_extra = sentencepiece.whole_pieces(file, user_defined=False)
    names = {token_id: token.content for token_id, token in settings.added.items()}
    if file.normalizer.add_dummy_prefix:
        # Found in the raw text, so that each text between them gets its own blank.
        for token_id, token in settings.added.items():
            settings.added[token_id] = AddedToken(**token.__getstate__() | {"normalized": False})
    for role in ("bos", "eos", "unk"):
        if getattr(file.trainer, f"{role}_id") >= 0:
            settings.roles.setdefault(f"{role}_token", getattr(file.trainer, f"{role}_piece"))
    return sentencepiece.general_backend(
        file, names, prefix_every_chunk=bool(settings.options.get("legacy", True))
    )


def _add_tokens(
    backend: tokenizers.Tokenizer, settings: HfSettings, roles: Mapping[str, Token], *, resets_flags: bool
) -> None:
    """Adds the tokens that the settings name: with the id that the vocabulary has for their text, or else the
    next free one."""
    tokens: list[Token] = [settings.added[token_id] for token_id in sorted(settings.added)]
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    known.update(str(token) for token in tokens)
    extra = settings.old_extra if settings.extra is None else settings.extra
    for token in (*roles.values(), *extra):
        if str(token) not in known and token not in tokens:  # Objects of one text are equal.
            tokens.append(token)
    named = {str(token) for token in roles.values()}
    whole = [AddedToken(token, special=True) if isinstance(token, str) else token for token in tokens]
    for token in whole:
        token.special = token.special or token.content in named
    backend.add_tokens(whole)
    if resets_flags:
        backend.add_tokens([AddedToken(str(token), special=True) for token in (*roles.values(), *extra)])


def _add_around(
    backend: tokenizers.Tokenizer, options: Mapping[str, Any], roles: Mapping[str, Token]
) -> None:
    """Puts the tokens around a text that ``add_bos_token`` and ``add_eos_token`` ask for. With a
    ``tokenizer.json`` transformers ignores these two: the file's post-processor counts."""
    bos = [str(roles["bos_token"])] if options.get("add_bos_token") and "bos_token" in roles else []
    eos = [str(roles["eos_token"])] if options.get("add_eos_token") and "eos_token" in roles else []
    backend.post_processor = processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        special_tokens=[(text, backend.token_to_id(text)) for text in dict.fromkeys((*bos, *eos))],
    )


def _refuse_unsupported(
    folder: Path, config: Mapping[str, Any], options: Mapping[str, Any], backend: tokenizers.Tokenizer
) -> None:
    settings = folder / "tokenizer_config.json"
    if set(options.get("fast_tokenizer_files") or ()) - {"tokenizer.json"}:
        raise ModelError(f"{settings}: fast_tokenizer_files is unsupported; keep tokenizer.json alone")
    forced = options.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    if options.get("clean_up_tokenization_spaces") and (forced or not isinstance(backend.model, models.BPE)):
        raise ModelError(
            f"{settings}: clean_up_tokenization_spaces deletes blanks that the model wrote and is "
            "unsupported; set it to false"
        )
    release = str(config.get("transformers_version") or "0").partition(".")[0]
    if options.get("fix_mistral_regex") and config and release.isdecimal() and int(release) < 5:
        raise ModelError(f"{settings}: fix_mistral_regex is unsupported; save it again with transformers 5")


def _template_text(folder: Path, options: Mapping[str, Any]) -> str | None:
    """The chat template: of the files ``chat_template.jinja`` and ``additional_chat_templates/*.jinja``, or
    else of the configuration; of several named ones, the one named default."""
    more = folder / "additional_chat_templates"
    for path in (more / "default.jinja", folder / "chat_template.jinja"):
        if path.is_file():
            return _read_text(path)
    template = options.get("chat_template")
    if any(more.glob("*.jinja")):
        template = None
    if isinstance(template, list):
        entries = (entry for entry in template if isinstance(entry, Mapping))
        template = {entry.get("name"): entry.get("template") for entry in entries}
    if isinstance(template, Mapping):
        template = template.get("default")
    return template if isinstance(template, str) else None
