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

_FIX = "get the tokenizer.json, or convert: transformers.AutoTokenizer.from_pretrained(…).save_pretrained(…)"


def from_hf(path: Path, name: str) -> Tokenizer:
    """``path``: a folder with ``tokenizer.json`` or ``tokenizer.model`` and the files beside it; or one such
    file, which is then read by itself. Raises ModelError."""
    folder, file = (None, path) if path.is_file() else (path, _vocabulary(path))
    backend = _read(file) if file.suffix == ".json" else None
    settings, config, chosen = HfSettings({}), {}, GENERAL
    if folder is not None:
        settings = HfSettings.read(folder, backend)
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        byte_level = backend is not None and '"ByteLevel"' in _read_text(file)
        chosen = hf_class.choose(folder, config, settings.options, byte_level=byte_level)
    if backend is None:
        backend = _from_sentencepiece(file, chosen, settings)
        roles = _add_tokens(backend, settings, chosen)
        _add_around(backend, settings.options, roles, file)
    else:
        if backend.padding and "pad_token" not in chosen.defaults:
            settings.roles.setdefault("pad_token", backend.padding["pad_token"])
        backend = hf_class.rebuilt(backend, chosen, settings.options, file)
        roles = _add_tokens(backend, settings, chosen)
    _refuse_unsupported(path, config, settings.options, backend)
    backend.encode_special_tokens = bool(settings.options.get("split_special_tokens"))
    eos = backend.token_to_id(str(roles["eos_token"])) if "eos_token" in roles else None
    return Tokenizer(
        backend,
        name=name,
        special_tokens={role: str(token) for role, token in roles.items()},
        eos_ids=() if eos is None else (eos,),
        chat_template=None if folder is None else _templates(folder, settings.options),
    )


def _vocabulary(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer.model", "tekken.json", "tiktoken.model"):
        if (folder / name).is_file():
            return folder / name
    raise ModelError(
        f"{folder}: no tokenizer.json or tokenizer.model; save the model's fast tokenizer with transformers"
    )


def _read(path: Path) -> tokenizers.Tokenizer:
    if path.name.startswith("tekken"):
        raise ModelError(f"{path}: Mistral's own format is unsupported; {_FIX}")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(f"{path}: not a readable tokenizer; download it again") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: can't be read as UTF-8 text; download it again") from error


def _from_sentencepiece(path: Path, chosen: TokenizerClass, settings: HfSettings) -> tokenizers.Tokenizer:
    """Also completes ``settings`` with what the file says about special tokens."""
    file = SentencePieceFile.read(path)
    if chosen is LLAMA:
        settings.old_extra = sentencepiece.whole_pieces(file, user_defined=True)
        return chosen.build(sentencepiece.llama_model(file), settings.options)
    if chosen is not GENERAL:
        raise ModelError(
            f"{path}: tokenizer_class {chosen.name} doesn't read SentencePiece; get the tokenizer.json"
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
    backend: tokenizers.Tokenizer, settings: HfSettings, chosen: TokenizerClass
) -> Mapping[str, Token]:
    """Adds the tokens that the settings name: with the id that the vocabulary has for their text, or else the
    next free one. Returns the special ones by role."""
    roles = settings.named(chosen.defaults)
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
    if chosen.resets_flags:
        backend.add_tokens([AddedToken(str(token), special=True) for token in (*roles.values(), *extra)])
    return roles


def _add_around(
    backend: tokenizers.Tokenizer, options: Mapping[str, Any], roles: Mapping[str, Token], path: Path
) -> None:
    """Puts the tokens around a text that ``add_bos_token`` and ``add_eos_token`` ask for. With a
    ``tokenizer.json`` transformers ignores these two: the file's post-processor counts."""
    bos = [str(roles["bos_token"])] if options.get("add_bos_token") and "bos_token" in roles else []
    eos = [str(roles["eos_token"])] if options.get("add_eos_token") and "eos_token" in roles else []
    added = [(text, backend.token_to_id(text)) for text in dict.fromkeys((*bos, *eos))]
    try:
        backend.post_processor = processors.TemplateProcessing([*bos, "$A", *eos], special_tokens=added)
    except Exception as error:  # tokenizers raises plain Exception for texts that it reads as a pattern
        texts = " and ".join((*bos, *eos))
        raise ModelError(f"{path}: can't put {texts!r} around texts; set add_bos_token to false") from error


def _refuse_unsupported(
    path: Path, config: Mapping[str, Any], options: Mapping[str, Any], backend: tokenizers.Tokenizer
) -> None:
    settings = path / "tokenizer_config.json"
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


def _templates(folder: Path, options: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template, or several by name: those in files of their own, or else the configuration's."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if texts := {name: _read_text(path) for name, path in files.items() if path.is_file()}:
        return texts
    template = options.get("chat_template")
    if isinstance(template, list):
        entries = (entry for entry in template if isinstance(entry, Mapping))
        template = {entry.get("name"): entry.get("template") for entry in entries}
    if isinstance(template, Mapping):
        pairs = template.items()
        return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
    return template if isinstance(template, str) else None
