"""The way of a prefill segment's KV between its device and the shards.

New KV goes to the shards from pinned memory, in the background; past KV comes to the device the same way.
Nothing is copied for the spans of the engine's own worker, which lie on the device, nor on the host. Called
by ``segment`` from the engine's thread; what it returns and :meth:`KVCopies.pin` run in the shards' queues.
It must not know spans or layers.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from farshore.ids import WorkerId
from farshore.kernels.runtime.base import DeviceRuntime, Event, PinnedBuffer

KV = tuple[Tensor, Tensor]
"""k and v, each [heads, tokens, elements or bytes]."""
Pulled = KV | tuple[PinnedBuffer, PinnedBuffer]


class KVCopies:
    """Copies of one segment's KV; one layer at a time is on its way to the shards."""

    def __init__(self, runtime: DeviceRuntime, new: KV, *, token_major: bool, local: WorkerId | None) -> None:
        """``new``: the contiguous memory of a layer's new k and v, [heads, tokens, ..] or, if
        ``token_major``, [tokens, heads, ..]. ``local``: the worker whose spans lie on the device, if any."""
        self._runtime = runtime
        self._new = new
        self._token_major = token_major
        self._local = local
        self._stream = None if runtime.is_host else runtime.stream()
        self._pinned: tuple[PinnedBuffer, ...] = ()
        self._computed: Event | None = None
        self._downloaded: Event | None = None

    def begin_layer(self) -> None:
        """The work that was submitted so far computes the layer's k and v."""
        if self._stream is not None:
            self._computed, self._downloaded = self._runtime.main.record(), None

    def reader(self, worker: WorkerId) -> Callable[[], KV]:
        """Returns a function that blocks until the layer's k and v are there, where the worker's client can
        read them, and returns them. They are valid until the next layer's are computed."""
        if self._stream is None or worker == self._local:
            return partial(self._read, self._computed, None)
        if self._downloaded is None:
            self._download()
        return partial(self._read, self._downloaded, self._pinned)

    def pin(self, worker: WorkerId, pulled: KV) -> Pulled:
        """Takes past k and v that were read from ``worker``'s store to pinned memory, unless they lie where
        they are used."""
        if self._stream is None or worker == self._local:
            return pulled
        k, v = pulled
        return self._runtime.pin(k), self._runtime.pin(v)

    def on_device(self, pulled: Pulled, dtype: torch.dtype) -> KV:
        """Returns k and v as work of ``runtime.main`` from now on sees them."""
        k, v = (part if isinstance(part, Tensor) else self._uploaded(part, dtype) for part in pulled)
        return k, v

    def _uploaded(self, pinned: PinnedBuffer, dtype: torch.dtype) -> Tensor:
        values = pinned.read()
        target = torch.empty(values.shape, dtype=dtype, device=self._runtime.device)
        self._runtime.main.upload(pinned, target)
        return target

    def _download(self) -> None:
        assert self._stream is not None and self._computed is not None
        if not self._pinned:
            self._pinned = tuple(self._runtime.pinned(*x.shape, dtype=x.dtype) for x in self._new)
        self._stream.wait(self._computed)
        for source, target in zip(self._new, self._pinned, strict=True):
            self._stream.download(source, target)
        self._downloaded = self._stream.record()

    def _read(self, event: Event | None, pinned: tuple[PinnedBuffer, ...] | None) -> KV:
        if event is not None:
            event.wait()
        k, v = self._new if pinned is None else (buffer.read() for buffer in pinned)
        return (k.transpose(0, 1), v.transpose(0, 1)) if self._token_major else (k, v)
