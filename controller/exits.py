"""How a process ended, in words that complete "<part> …". For the messages of driver and controller."""

import re
import signal


def how_it_ended(code: int) -> str:
    """For people, from a process's exit code as ``subprocess`` gives it."""
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def how_an_actor_ended(error: Exception) -> str:
    """Of the page that Ray writes: which process, and why it went as far as Ray knows."""
    text = str(error)
    process = re.search(r"pid: (\d+)", text)
    named = f"(process {process[1]}) " if process else ""
    if "connection error code 2" in text:
        return f"{named}was killed, ran out of memory or crashed"
    detail = re.search(r"Worker exit detail: (.+?)(?:\. |$)", text)
    return f"{named}ended{f': {detail[1]}' if detail else ''}"
