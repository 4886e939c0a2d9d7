"""Enum values of the protocol as the words that people read: "dense" for WORKER_KIND_DENSE.

Used where messages become values or text. A number that this version does not know, of a newer peer, is
"unspecified".
"""

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper


def word(enum: EnumTypeWrapper, value: int) -> str:
    """The value's name in lower case, without the enum's prefix."""
    names = enum.DESCRIPTOR.values_by_number
    unspecified = names[0].name
    name = names[value].name if value in names else unspecified
    return name.removeprefix(unspecified.removesuffix("UNSPECIFIED")).lower()
