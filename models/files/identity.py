"""Which file was opened: a path may mean another file a moment later.

Called by the readers of model files, and by ``weights.content``.
"""

import os
from typing import NamedTuple


class FileIdentity(NamedTuple):
    """A file that is not being written keeps its identity as long as it keeps its content."""

    size: int
    changed_ns: int
    """Time of the last change of the content."""
    inode: int
    device: int

    @classmethod
    def of(cls, file: int | os.PathLike[str]) -> "FileIdentity":
        """``file``: an open file's descriptor or a path. Raises OSError."""
        status = os.stat(file)
        return cls(status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)
