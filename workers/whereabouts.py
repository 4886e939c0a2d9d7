"""Where a worker runs, in the operator's words: the names of its machine and of that one's failure domain.

Used by ``dense`` and ``attention`` for what they announce. The Helm chart sets the variables from Kubernetes'
downward API, so that no pod needs the right to read nodes. Must not know what the names are used for.
"""

import os
from typing import TypedDict

NODE, ZONE = "FARSHORE_NODE", "FARSHORE_ZONE"


class Whereabouts(TypedDict):
    """Fields of a :class:`~farshore.kvstore.directory.base.WorkerRecord`; empty if not named."""

    node: str
    zone: str


def whereabouts() -> Whereabouts:
    """What the environment of this process says."""
    return {"node": os.environ.get(NODE, ""), "zone": os.environ.get(ZONE, "")}
