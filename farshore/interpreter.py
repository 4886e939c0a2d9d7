"""How a process that serves others shares Python's interpreter, and its cores, among its threads."""

import gc
import os
import sys
import threading
from contextlib import suppress

SWITCH_INTERVAL_S = 0.0005
"""How long a thread that computes in Python keeps the interpreter while another one waits for it. At the
default of 5 ms one handler of a large request makes every other thread wait 5 ms whenever it comes back from
a native call or a socket, dozens of times a decode step or a call."""

GC_THRESHOLDS = (20_000, 20, 50)
"""The garbage collector holds the interpreter while it looks through every container: at the default
thresholds it took a third of the gateway's time while long prompts, lists of a million tokens each, were
tokenized. What serves makes few cycles, so it looks a tenth as often."""


def share_interpreter() -> None:
    """Call once, when everything is loaded: threads that wait for the interpreter get it soon, and the
    garbage collector leaves alone what is there already."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def make_nicer(by: int) -> None:
    """The calling thread gives way to the process's others. It stays as it is where the system does not allow
    more."""
    thread = threading.get_native_id()
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + by)
