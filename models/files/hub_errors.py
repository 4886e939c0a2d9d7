"""Says in one line why files could not be had from the Hugging Face hub, and what helps.

Called by ``hub``. The hub's client raises a dozen classes of errors, with advice for programmers in several
lines; users need to know which of six things to do. It must not call the hub.
"""

import errno
import os
from collections.abc import Iterator

from farshore.errors import ModelError
from farshore.text import shortened

_MOST_CHARS = 160
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
_LOCAL = "give a local directory instead"


def explained(error: Exception, *, name: str, revision: str | None, missing: str | None) -> ModelError:
    """``name``: the model as the user gave it. ``missing``: what the cache lacks of the revision, or None if
    it holds nothing of it."""
    # Imported here: the hub's client takes a third of a second, and most starts are local.
    from huggingface_hub import constants, errors, get_token

    causes = list(_causes(error))
    page = f"{constants.ENDPOINT}/{name.partition(':')[0]}"

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if caused_by(errors.HFValidationError):
        why = "is not a valid id of the Hugging Face hub; ids look like org/name"
    elif caused_by(errors.GatedRepoError):
        login = (
            "and use a token of that account" if get_token() else "then set HF_TOKEN or run `hf auth login`"
        )
        why = f"is a gated model: accept its licence at {page} with your account, {login}"
    elif caused_by(errors.RevisionNotFoundError):
        why = f"has no revision {revision!r}: --revision takes a branch, tag or commit of {page}"
    elif caused_by(errors.DisabledRepoError):
        why = f"was disabled by the hub, see {page}; use another copy"
    elif caused_by(errors.RepositoryNotFoundError):
        login = "your token may not read it" if get_token() else "if it is private, set HF_TOKEN"
        why = f"is neither a local directory nor a model at {constants.ENDPOINT}: check the id; {login}"
    elif caused_by(errors.OfflineModeIsEnabled):
        why = f"{_held(missing)}, and HF_HUB_OFFLINE forbids downloads: unset it, or {_LOCAL}"
    elif (number := _error_number(causes)) in _NO_ROOM:
        return disk_full(name)
    elif number in _NO_ACCESS:
        why = f"can't be written to the cache {constants.HF_HUB_CACHE}: set HF_HOME to a folder of your own"
    elif (status := _status(causes)) is not None:
        why = _refusal(status, constants.ENDPOINT)
    elif caused_by(errors.FileMetadataError):
        why = f"was not answered for as a hub does by {constants.ENDPOINT}: check HF_ENDPOINT and proxies"
    else:
        network = "check HF_ENDPOINT" if os.environ.get("HF_ENDPOINT") else "check the network and proxies"
        why = (
            f"{_held(missing)}, and {constants.ENDPOINT} can't be reached or broke off ({_told(causes[-1])}):"
            f" {network} and try again, or {_LOCAL}"
        )
    return ModelError(f"{name}: {why}")


def disk_full(name: str, *, missing_bytes: int | None = None, free_bytes: int = 0) -> ModelError:
    """The error of a download without room. ``missing_bytes``: the size of what is to be downloaded, if
    known."""
    from huggingface_hub import constants

    need = "" if missing_bytes is None else f" for {missing_bytes / 1e9:.2f} GB ({free_bytes / 1e9:.2f} free)"
    return ModelError(
        f"{name}: the disk of the cache {constants.HF_HUB_CACHE} has no room{need}:"
        " free some, or set HF_HOME to a folder on another disk"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes; the last one came first."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _held(missing: str | None) -> str:
    return "is not in the hub's cache" if missing is None else f"is in the hub's cache without {missing}"


def _error_number(causes: list[BaseException]) -> int | None:
    for cause in causes:
        # A socket's errors have no file name.
        if isinstance(cause, OSError) and (cause.filename or cause.errno in _NO_ROOM):
            return cause.errno
    return None


def _status(causes: list[BaseException]) -> int | None:
    responses = (getattr(cause, "response", None) for cause in causes)
    return next((response.status_code for response in responses if response is not None), None)


def _refusal(status: int, endpoint: str) -> str:
    if status == 401:
        return f"was refused, because {endpoint} doesn't know the token: set HF_TOKEN or run `hf auth login`"
    if status == 403:
        return "was refused (403): your token may not read it; give one that may in HF_TOKEN"
    if status == 429:
        return f"was refused, because {endpoint} got too many requests: try later, or set HF_TOKEN"
    if status >= 500:
        return f"was not answered for: {endpoint} has failed ({status}); try again later, or {_LOCAL}"
    return f"was refused by {endpoint} ({status}): check the id, and HF_ENDPOINT if it is set"


def _told(error: BaseException) -> str:
    return shortened(" ".join(f"{type(error).__name__}: {error}".split()), _MOST_CHARS)
