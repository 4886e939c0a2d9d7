"""Transactions that are run again: what a step, a unit of prefill and a seal have in common.

Whatever is given here leaves no trace when it raises. Called by the engine's loop.
"""

import time
from collections.abc import Callable
from typing import TypeVar

from farshore.errors import FarshoreError

T = TypeVar("T")

ATTEMPTS = 4
RETRY_PAUSE_S = 0.05
"""Before the second attempt, doubled for each one after it: a restarted connection needs a moment."""


def attempt(transaction: Callable[[], T]) -> T:
    """What ``transaction`` returns; it is run again while what broke it is retryable."""
    for failed in range(ATTEMPTS - 1):
        try:
            return transaction()
        except FarshoreError as error:
            if not error.retryable:
                raise
            time.sleep(RETRY_PAUSE_S * 2**failed)
    return transaction()
