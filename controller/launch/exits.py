"""Describes how a process ended, for messages such as "the gateway was killed by SIGKILL".

Called by the driver's modules and by the controller. Each text completes "<name of the process> …".
"""

import re
import signal

NOT_STARTED = "could not start: "
"""Precedes the error with which an actor's constructor ended."""


def exit_in_words(code: int) -> str:
    """``code``: an exit code as ``subprocess`` reports it; negative: the number of the signal."""
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def actor_end_in_words(error: Exception) -> str:
    """The process id and the reason from Ray's message about a dead actor, as far as it has them."""
    text = str(error)
    process = re.search(r"pid: (\d+)", text)
    named = f"(process {process[1]}) " if process else ""
    if "node has died" in text:
        return f"{named}ended with its node, which is lost"
    if raised := re.search(r"farshore\.errors\.\w+: (.+?)(?:\\n|\n|$)", text):
        return f"{named}{NOT_STARTED}" + raised[1].replace("\\'", "'")
    if "connection error code 2" in text:
        return f"{named}was killed, ran out of memory or crashed"
    detail = re.search(r"Worker exit detail: (.+?)(?:\. |$)", text)
    return f"{named}ended{f': {detail[1]}' if detail else ''}"
