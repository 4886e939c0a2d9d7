"""Cuts text for messages: error messages travel in HTTP/2 trailers, which have room for a few KiB.

Called wherever a message repeats text that Farshore did not write: a client's strings, a model's template,
another process's error. Must not know about errors or transports.
"""

MOST_CHARS = 200


def shortened(text: str, most_chars: int = MOST_CHARS) -> str:
    """``text`` if it has at most ``most_chars`` characters; else its beginning and its length, in exactly
    ``most_chars`` characters. ``most_chars`` must leave room for the length: at least 40."""
    return text if len(text) <= most_chars else _cut(text, most_chars, len(text), "")


def quoted(text: str, most_chars: int = MOST_CHARS) -> str:
    """As :func:`shortened`, but in quotes and escaped as by ``repr``, so that it stays on one line."""
    # Only the beginning is escaped: the time must not depend on the length of the rest.
    start = repr(text[:most_chars])
    if len(start) <= most_chars and len(text) <= most_chars:
        return start
    return _cut(start, most_chars, len(text), start[0])


def _cut(text: str, most_chars: int, length: int, quote: str) -> str:
    end = f"...{quote} ({length} characters)"
    return text[: most_chars - len(end)] + end
