"""Client strings in messages: short, and on one line.

Called wherever a message quotes what a client or a template wrote. Error messages travel in HTTP/2 trailers,
which have room for a few kilobytes.
"""

MOST_CHARS = 200


def shown(text: str) -> str:
    """``text`` quoted and escaped, in at most 200 characters; a longer one says how long it was."""
    # repr of the beginning alone: the time must not depend on the rest.
    quoted = repr(text[:MOST_CHARS])
    if len(quoted) <= MOST_CHARS and len(text) <= MOST_CHARS:
        return quoted
    end = f"…' ({len(text)} characters)"
    return quoted[: MOST_CHARS - len(end)] + end


def shortened(message: str, most_chars: int = 1000) -> str:
    """A message of another part's making, cut where it is longer than ``most_chars``."""
    return message if len(message) <= most_chars else message[: most_chars - 1] + "…"
