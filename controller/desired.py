"""How many workers of each kind there are to be: the configuration's numbers, or those of the last scale.

Used by ``controller``. A restarted controller gets its first configuration again, so what ``scale`` changed
is kept in a file.
"""

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from farshore.controller.config import check_counts
from farshore.controller.reconcile import KINDS, Kind
from farshore.errors import InvalidRequest


class Desired:
    """Thread-safe. ``file``: where the numbers are kept; its folder exists. ``keep``: whether numbers in the
    file win, because the controller restarted; else the file is replaced."""

    def __init__(self, first: Mapping[Kind, int], file: Path, *, placement: str, keep: bool) -> None:
        self._file = file
        self._placement = placement
        self._lock = threading.Lock()
        self._counts = dict(first)
        if keep and file.exists():
            stored = json.loads(file.read_text(encoding="utf-8"))
            self._counts = {kind: int(stored[kind]) for kind in KINDS}
        else:
            self._store()

    def counts(self) -> dict[Kind, int]:
        """The number of workers of each kind."""
        with self._lock:
            return dict(self._counts)

    def scale(self, changes: Mapping[Kind, int]) -> dict[Kind, int]:
        """Changes the numbers; durable when it returns. Returns those in force. Raises InvalidRequest for a
        number that can't work."""
        with self._lock:
            counts = self._counts | changes
            check_counts(counts["dense"], counts["attention"], placement=self._placement)
            self._counts = counts
            self._store()
            return dict(counts)

    def _store(self) -> None:
        new = self._file.with_suffix(".new")
        try:
            with new.open("w", encoding="utf-8") as file:
                json.dump(self._counts, file)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._file)
        except OSError as error:
            raise InvalidRequest(
                f"{self._file}: the numbers can't be stored: {error.strerror or error}"
            ) from error
