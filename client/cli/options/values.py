"""Types of option values that several subcommands share: sizes, numbers, times, addresses.

Used by the subcommands' modules and by the other options. Must not know what the values are for.
"""

import argparse
import re

DEFAULT_SERVER = "127.0.0.1:50051"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def size_bytes(text: str) -> int:
    """Parses a size: 512MiB, 1GiB, 2g (GiB), 1.5GB (powers of 1000), 1073741824."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not (match[2] and match[4])):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size: use bytes, or a number with KiB, MiB or GiB, such as 512MiB or 2GiB"
        )
    number, unit, binary, byte = match.groups()
    base = 1000 if unit and byte and not binary else 1024
    return (
        int(float(number) * base ** _POWERS[unit.lower()])
        if "." in number
        else (int(number) * base ** _POWERS[unit.lower()])
    )


def whole(text: str) -> int:
    """Parses a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def number(text: str) -> float:
    """Parses a number, also NaN and infinity."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def seconds(text: str) -> float:
    """Parses a time above 0, in seconds, of at most a year."""
    value = number(text)
    if not 0 < value <= 365 * 86_400:
        raise argparse.ArgumentTypeError(f"{text}: use a number of seconds above 0, such as 2.5")
    return value


def positive(text: str) -> int:
    """Parses a whole number from 1 on."""
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: use a whole number from 1 on")
    return value


def server_address(text: str) -> str:
    """Checks HOST:PORT; an IPv6 host must be in brackets."""
    host, _, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    is_port = port.isascii() and port.isdigit() and 0 < int(port) <= 65535
    if not bare or not is_port or (":" in bare) != (bare != host):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no address: use HOST:PORT, such as {DEFAULT_SERVER} or [::1]:50051"
        )
    return text


def server_addresses(text: str) -> list[str]:
    """Checks one HOST:PORT, or several with commas between them."""
    return [server_address(address.strip()) for address in text.split(",")]
