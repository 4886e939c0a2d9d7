"""One span in this process's arena: the record that the store keeps, and what may be asked of it.

For :mod:`farshore.kvstore.store.store` alone, which guards every change. It must not know who holds it.
"""

from dataclasses import dataclass, field

from farshore.errors import InvalidRequest
from farshore.ids import Epoch, SpanId
from farshore.kernels.base import KVLayout
from farshore.kvstore.base import Covered, Digest, SpanKey
from farshore.kvstore.store import forms
from farshore.kvstore.store.arena import Extent
from farshore.kvstore.store.ranges import Ranges


@dataclass(slots=True, kw_only=True, eq=False)
class Span:
    key: SpanKey
    layout: KVLayout
    capacity_tokens: int
    epoch: Epoch
    """Of creation."""
    extents: list[Extent]
    bases: list[int]
    written: list[Ranges]
    """Per layer, the tokens at or above the sealed mark that were written (below it: all)."""
    sealed_tokens: int = 0
    sealed_before: int = 0
    """The mark before the last seal: the last digest is of [sealed_before, sealed_tokens)."""
    digest: tuple[int, Digest] | None = None
    """The last one known of tokens ``[0, n)``, and n: what is sealed never changes."""
    covers: tuple[Covered, ...] = ()
    """Of what this is the parity; then it has no tokens of its own."""
    pins: int = 0
    """Calls that read its memory right now: it is not freed meanwhile."""
    removed: bool = False
    """Not in the store any more; only pins keep its memory."""
    bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.bytes = sum(extent.bytes for extent in self.extents)


def check_shape(key: SpanKey, capacity_tokens: int, layout: KVLayout) -> None:
    forms.check_layout(layout)
    # The upper bounds are those of the integers in Segments.
    if key.first < 0 or capacity_tokens < 1 or key.first + capacity_tokens > 2**31 - 1:
        raise InvalidRequest(
            f"{capacity_tokens} tokens from {key.first}: ask for 1 or more, within [0, 2^31 - 1)"
        )
    if not 0 <= key.group0 < key.group1 < 2**15:
        raise InvalidRequest(f"groups {key.group0} to {key.group1}: give 0 <= group0 < group1 < 2^15")
    if layout.groups != key.group1 - key.group0:
        raise InvalidRequest(
            f"layout of {layout.groups} groups, key of {key.group1 - key.group0}: narrow it with of_groups"
        )


def check_readable(span: SpanId, it: Span, first: int, last: int) -> None:
    """As :func:`check_sealed`, and that these are tokens."""
    if it.covers:
        raise InvalidRequest(f"{span} is the parity of {len(it.covers)} spans: export it to rebuild one")
    check_sealed(span, it, first, last)


def check_sealed(span: SpanId, it: Span, first: int, last: int) -> None:
    if not 0 <= first <= last <= it.sealed_tokens:
        raise InvalidRequest(f"tokens {first} to {last} of {span}: sealed are 0 to {it.sealed_tokens}")
