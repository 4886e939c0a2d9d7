"""Finds a model's files in the Hugging Face hub's cache, and downloads what is missing there.

Called by ``source`` for hub ids. Only the files that a model needs are downloaded, one after the other: a
large file is fetched in parallel by the hub's client itself, and an interrupt takes effect at once. Processes
share the cache: the client locks each file. It must not know what the files contain, except the index of
weights.
"""

import json
import shutil
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from farshore.errors import ModelError
from farshore.models.files import hub_errors, selection

Progress = Callable[[str], None]
"""Called with a few words, now and then."""

_LISTING_DEADLINE_S = 10.0
_REPORTS = 20
"""A download is reported this many times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """``tag``: which GGUF model of a repository to take, as ``selection.pick_gguf`` reads it. ``revision``: a
    branch, a tag or a commit; None: the main branch. ``tokenizer_only``: leave the weights out."""

    repository: str
    tag: str | None = None
    revision: str | None = None
    tokenizer_only: bool = False

    @property
    def name(self) -> str:
        return self.repository if self.tag is None else f"{self.repository}:{self.tag}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Files of one commit. ``gguf``: the GGUF model's first file; None for files in the Hugging Face
    layout."""

    folder: Path
    commit: str
    gguf: str | None = None


def fetch(wanted: Wanted, progress: Progress) -> Snapshot:
    """Returns the files of ``wanted``, after downloading those that the cache lacks. A commit that the cache
    holds completely needs no network. A hub that can't be reached is no error if the cache holds the revision
    completely. Raises ModelError, which names the fix."""
    # Imported here: the hub's client takes a third of a second, and most starts are local.
    from huggingface_hub.errors import OfflineModeIsEnabled, RevisionNotFoundError

    cached = _Cached.find(wanted)
    if cached.certain and cached.snapshot is not None and cached.snapshot.commit == wanted.revision:
        return cached.snapshot
    try:
        return _download(wanted, progress)
    except ModelError:
        raise
    except Exception as error:
        # The hub client raises its HTTP library's exceptions, and has replaced that library before.
        if cached.snapshot is None or isinstance(error, RevisionNotFoundError):
            raise hub_errors.explained(
                error, name=wanted.name, revision=wanted.revision, missing=cached.missing
            ) from error
        is_offline = isinstance(error, OfflineModeIsEnabled)
        why = "HF_HUB_OFFLINE is set" if is_offline else "the hub refused or gave no answer"
        progress(f"{wanted.name}: {why}; using commit {cached.snapshot.commit[:7]} from the cache")
        return cached.snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cached:
    """``snapshot``: the revision in the cache, if it can be used. ``certain``: the hub has no more files of
    it, either. ``missing``: what the snapshot lacks, in words; None if the cache holds nothing of the
    revision."""

    snapshot: Snapshot | None = None
    certain: bool = False
    missing: str | None = None

    @classmethod
    def find(cls, wanted: Wanted) -> Self:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            # No file matches: the call only finds the folder.
            found = snapshot_download(
                wanted.repository, revision=wanted.revision, local_files_only=True, allow_patterns=[]
            )
        except (LocalEntryNotFoundError, HFValidationError):
            return cls()
        folder = Path(found)
        names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
        try:
            files, gguf = _files(wanted, names, index=lambda: _index(folder))
        except ModelError as error:
            return cls(missing=f"what it needs ({error})")
        if missing := [name for name in files if name not in names]:
            more = f" and {len(missing) - 3} more" if missing[3:] else ""
            return cls(missing=", ".join(missing[:3]) + more)
        return cls(
            snapshot=Snapshot(folder=folder, commit=folder.name, gguf=gguf),
            # Other programs fetch the weights first.
            certain=gguf is not None or selection.has_vocabulary(names),
        )


def _download(wanted: Wanted, progress: Progress) -> Snapshot:
    """Raises ModelError for a repository that holds no such model, and any exception of the hub's client."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import logging

    # Its warnings, of retries and of downloads without a token, would break the lines of our own progress.
    logging.set_verbosity_error()
    repository = wanted.repository
    info = HfApi().model_info(
        repository, revision=wanted.revision, files_metadata=True, timeout=_LISTING_DEADLINE_S
    )
    assert info.sha is not None, "the hub names the commit of every revision"
    sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or ()}
    received = _Received(wanted.name, progress)
    bar = _bar_class(received)

    def download(name: str, revision: str | None = info.sha) -> Path:
        return Path(hf_hub_download(repository, name, revision=revision, tqdm_class=bar))

    files, gguf = _files(wanted, sizes, index=lambda: _index(download(selection.INDEX).parent))
    if absent := [name for name in files if name not in sizes]:
        raise ModelError(f"{wanted.name}: lacks {', '.join(absent[:3])}; use another copy of the model")
    missing_bytes = sum(
        sizes[name]
        for name in files
        if not isinstance(try_to_load_from_cache(repository, name, revision=info.sha), str)
    )
    _check_disk(wanted.name, missing_bytes)
    received.expect(missing_bytes)
    if missing_bytes:
        # By the branch's name, so that the cache records its commit, for times without a network.
        download(files[0], wanted.revision)
    paths = [download(name) for name in files]
    return Snapshot(folder=paths[0].parents[files[0].count("/")], commit=info.sha, gguf=gguf)


def _files(
    wanted: Wanted, names: Collection[str], *, index: Callable[[], list[str]]
) -> tuple[list[str], str | None]:
    """(the files to have, small ones first; the GGUF model's first file or None). ``names``: those of the
    repository. ``index``: reads the names of the weights' files from ``selection.INDEX``. Raises
    ModelError."""
    if wanted.tokenizer_only and wanted.tag is None and selection.has_vocabulary(names):
        return selection.small_files(names, tokenizer_only=True), None
    has_weights = selection.WEIGHTS in names or selection.INDEX in names
    if wanted.tag is not None or (selection.gguf_models(names) and not has_weights):
        fix = f"name one of them, as in {wanted.repository}:Q4_K_M"
        first = selection.pick_gguf(names, wanted.tag, where=wanted.name, fix=fix)
        return selection.gguf_parts(first), first
    if wanted.tokenizer_only:
        raise ModelError(
            f"{wanted.name}: has no {' or '.join(selection.VOCABULARIES)}; name another tokenizer"
        )
    small = selection.small_files(names, tokenizer_only=False)
    if selection.CONFIG not in names:
        raise ModelError(f"{wanted.name}: has no {selection.CONFIG}; give the id of a transformers model")
    if selection.WEIGHTS in names:
        return [*small, selection.WEIGHTS], None
    if selection.INDEX in names:
        return [*small, selection.INDEX, *index()], None
    raise selection.no_weights(names, where=wanted.name)


def _index(folder: Path) -> list[str]:
    """The files that the index of weights names. Raises ModelError if it is damaged, or names a file outside
    the folder."""
    path = folder / selection.INDEX
    try:
        files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        if all(name == Path(name).name for name in files):
            return files
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: not a readable index of weights; download it again") from error
    raise ModelError(
        f"{path}: names files in other folders, which are not loaded; use another copy of the model"
    )


def _check_disk(name: str, missing_bytes: int) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).absolute()
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if (free_bytes := shutil.disk_usage(existing).free) < missing_bytes:
        raise hub_errors.disk_full(name, missing_bytes=missing_bytes, free_bytes=free_bytes)


class _Received:
    """The bytes of all files together that were downloaded so far, reported to ``progress``. Thread-safe."""

    def __init__(self, name: str, progress: Progress) -> None:
        self._name = name
        self._progress = progress
        self._lock = threading.Lock()
        self._total_bytes = self._done_bytes = self._reported = 0

    def expect(self, total_bytes: int) -> None:
        """Starts to count: ``total_bytes`` are to be downloaded."""
        self._total_bytes, self._done_bytes = total_bytes, 0
        if total_bytes:
            self._progress(f"downloading {self._name}: {_gb(total_bytes)}")

    def add(self, count_bytes: int) -> None:
        with self._lock:
            self._done_bytes += count_bytes
            step = self._done_bytes * _REPORTS // self._total_bytes if self._total_bytes else 0
            if step == self._reported:
                return
            self._reported = step
        self._progress(f"downloading {self._name}: {_gb(self._done_bytes)} of {_gb(self._total_bytes)}")


def _bar_class(received: _Received) -> type:
    """A class for the client's ``tqdm_class``: counts bytes, and prints nothing. Its methods are those that
    the client calls."""

    class Bar:
        def __init__(self, *_: object, **__: object) -> None:
            """Of one file. The client gives its name and size."""

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            self.close()

        def update(self, count_bytes: float | None = 1) -> None:
            received.add(int(count_bytes or 0))

        def update_transfer(self, count_bytes: float | None = 1) -> None:
            """Bytes received from the network; ``update`` counts those that are on the disk."""

        def set_postfix_str(self, *_: object, **__: object) -> None:
            """The rate."""

        set_transfer_postfix_str = set_postfix_str

        def close(self) -> None:
            """Nothing is shown."""

    return Bar


def _gb(count_bytes: int) -> str:
    return f"{count_bytes / 1e9:.2f} GB"
