"""Keeps a worker listed in the directory, from a thread of its own.

Called by ``dense`` and ``attention``. A directory that does not answer is asked again: a worker never ends,
and gives nothing up, because of it. It must not know what the worker does.
"""

import contextlib
import logging
from collections.abc import Callable

from farshore.errors import FarshoreError, InvalidRequest, Unauthenticated
from farshore.kvstore.directory.base import RENEW_S, Directory, Listing, WorkerRecord
from farshore.periodic import PeriodicThread

_LOG = logging.getLogger(__name__)


class Lease:
    """Renews from construction until :meth:`end`. ``record``: returns what the worker announces now;
    ``heard`` is called with the directory's listing after each renewal. Both are called from the lease's
    thread."""

    def __init__(
        self,
        directory: Directory,
        record: Callable[[], WorkerRecord],
        *,
        heard: Callable[[Listing], None] | None = None,
        period_s: float = RENEW_S,
    ) -> None:
        self._directory = directory
        self._record = record
        self._heard = heard
        self._thread = PeriodicThread(self._renew, name="lease", period_s=period_s, tell=_tell)
        self._thread.start()

    def end(self) -> None:
        """Withdraws the worker, if the directory answers. Idempotent."""
        self._thread.stop()
        with contextlib.suppress(FarshoreError):
            self._directory.withdraw(self._record().worker)

    def _renew(self) -> None:
        self._directory.renew(self._record())
        if self._heard is not None:
            self._heard(self._directory.listing())


def _tell(error: Exception) -> None:
    """Logs what an operator must mend. A directory that does not answer is asked again, without a word."""
    if isinstance(error, Unauthenticated | InvalidRequest):
        _LOG.warning("this worker is not listed any more: %s", error)
    elif not isinstance(error, FarshoreError):
        _LOG.error("the lease can't be renewed", exc_info=error)
