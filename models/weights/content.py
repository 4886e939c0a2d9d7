"""The digest of a model's content: what stored KV depends on, except the tokens, KV format and tenant.

Called by ``load``, which feeds it the bytes of each tensor as they are read. The digest is equal on all hosts
and depends on no path, file name, time or split into files: it covers the configuration's fields, the dtype
of the computation, and every tensor's name (ours), type, shape and bytes. It must not import torch or know a
file format.

Digests of tensors are cached by the file's size, time of change, inode and device, so that the next start
hashes nothing. The cache may be lost, damaged or unwritable at any time.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from farshore.errors import ModelError
from farshore.models.config.model import ModelConfig
from farshore.models.files.identity import FileIdentity
from farshore.models.weights.stored import StoredTensor

_FORMAT = 1
_MOST_FILES = 1000
"""Most entries of the cache; the oldest are removed."""
_RACE_NS = 2_000_000_000
"""A file that changed this recently may change again within the same tick of the file system's clock."""
_IRRELEVANT = ("name", "eos_token_ids")
"""Fields of ModelConfig that change no KV."""


class TensorHash:
    """The hash of one tensor. ``update`` costs nothing if the digest is known already."""

    def __init__(self, stored: StoredTensor, known: str | None) -> None:
        self._known = known
        self._hash = hashlib.sha256(_text([stored.dtype, *stored.shape]))

    def update(self, data: "memoryview | np.ndarray") -> None:
        if self._known is None:
            self._hash.update(data)

    def hexdigest(self) -> str:
        return self._known or self._hash.hexdigest()


class _File(NamedTuple):
    identity: FileIdentity
    started_ns: int
    known: Mapping[str, str]
    """Digests by the tensors' names in the file, from the cache."""
    used: dict[str, TensorHash]


class Content:
    """Collects the hashes of the tensors of one model. Not for several threads; its hashes are."""

    def __init__(self, cache: Path | None) -> None:
        """``cache``: a folder; None: no cache."""
        self._cache = cache
        self._files: dict[Path, _File] = {}
        self._tensors: dict[str, TensorHash] = {}

    def start(self, name: str, stored: StoredTensor) -> TensorHash:
        """``name``: ours. Every byte of the tensor must be given to the hash before :meth:`digest`."""
        file = self._files.get(stored.path)
        if file is None:
            known = self._read(stored.identity)
            file = self._files[stored.path] = _File(stored.identity, time.time_ns(), known, {})
        tensor = TensorHash(stored, file.known.get(stored.name))
        self._tensors[name] = file.used[stored.name] = tensor
        return tensor

    def digest(self, config: ModelConfig, dtype: str) -> str:
        """The model's content, in hexadecimal. ``dtype``: of the computation. Raises ModelError if a file
        changed since it was opened."""
        for path, file in self._files.items():
            if not _is(path, file.identity):
                raise ModelError(f"{path}: changed while it was read; start again when it is complete")
            self._write(file)
        fields = {name: value for name, value in asdict(config).items() if name not in _IRRELEVANT}
        tensors = {name: tensor.hexdigest() for name, tensor in self._tensors.items()}
        return hashlib.sha256(_text({"config": fields, "dtype": dtype, "tensors": tensors})).hexdigest()

    def _read(self, identity: FileIdentity) -> dict[str, str]:
        if self._cache is None:
            return {}
        try:
            entry = json.loads(_entry(self._cache, identity).read_bytes())
            if entry["format"] == _FORMAT and tuple(entry["file"]) == identity:
                return {
                    str(name): digest
                    for name, digest in entry["tensors"].items()
                    if len(bytes.fromhex(digest)) == hashlib.sha256().digest_size
                }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        return {}

    def _write(self, file: _File) -> None:
        if self._cache is None or file.used.keys() <= file.known.keys():
            return
        if file.started_ns - file.identity.changed_ns < _RACE_NS:
            return
        digests = {**file.known, **{name: tensor.hexdigest() for name, tensor in file.used.items()}}
        entry = _text({"format": _FORMAT, "file": file.identity, "tensors": digests})
        with suppress(OSError):
            self._cache.mkdir(parents=True, exist_ok=True)
            # Renamed when it is complete, since other processes read it.
            with tempfile.NamedTemporaryFile(dir=self._cache, delete=False) as stream:
                stream.write(entry)
            os.replace(stream.name, _entry(self._cache, file.identity))
            entries = sorted(self._cache.iterdir(), key=lambda path: path.stat().st_mtime_ns)
            for path in entries[:-_MOST_FILES]:
                path.unlink()


def user_cache() -> Path | None:
    """The user's folder of digests; None for a user without a home."""
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(caches, "farshore", "content")


def _entry(cache: Path, identity: FileIdentity) -> Path:
    return cache / f"{hashlib.sha256(_text(identity)).hexdigest()[:32]}.json"


def _is(path: Path, identity: FileIdentity) -> bool:
    """Whether ``path`` means this file."""
    try:
        return FileIdentity.of(path) == identity
    except OSError:
        return False


def _text(value: Any) -> bytes:
    """Canonical JSON: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"a configuration holds {value!r}")
