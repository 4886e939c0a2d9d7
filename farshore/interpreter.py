"""Settings of Python's interpreter and of thread priorities for processes that serve calls.

Called by the processes' main functions (gateway, dense worker, attention worker) and by threads that do
background work. Must not know what the threads do.
"""

import gc
import os
import sys
import threading
from contextlib import suppress

SWITCH_INTERVAL_S = 0.0005
"""How long a thread keeps the interpreter's lock while another thread waits for it. With Python's default of
5 ms, the handler of one large request delays every other thread by 5 ms each time that thread returns from a
native call or a socket: dozens of times per decode step or call."""

GC_THRESHOLDS = (20_000, 20, 50)
"""The garbage collector holds the interpreter's lock while it visits every container. With Python's default
thresholds it took a third of the gateway's time while prompts of a million tokens each were tokenized. The
serving code creates few reference cycles, so collections run a tenth as often."""


def share_interpreter() -> None:
    """Sets the switch interval and the garbage collector's thresholds, and exempts all existing objects from
    collection. Call once per process, when everything is loaded."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def make_nicer(by: int) -> None:
    """Raises the calling thread's niceness by ``by``, so that the process's other threads run first. Does
    nothing where the system refuses."""
    thread = threading.get_native_id()
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + by)
