"""The layer frames of a shard on a device: q comes in and the state goes out through pinned host memory.

Called by ``shard.session``, which has a stream for each connection, so that frames of different engines
overlap. A frame waits for its own event only::

    stream   ── upload q ── partial ── download o, lse ──●
    host     writes q ────────────────── waits ──────────┴─ reads o, lse

It must not know steps or spans.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from farshore.kernels.base import AttentionSpec, Kernels, State
from farshore.kernels.runtime.base import DeviceRuntime, Stream


class StagedFrame:
    """Memory for the frames of one micro-batch and one attention spec; each layer uses it in turn."""

    def __init__(
        self,
        runtime: DeviceRuntime,
        stream: Stream,
        spec: AttentionSpec,
        *,
        rows: int,
        heads: int,
        dtype: torch.dtype,
    ) -> None:
        """``heads``: query heads of the frame. ``dtype``: of q and o."""
        self._stream = stream
        q_shape, o_shape = (rows, heads, spec.k_dim), (rows, heads, spec.v_dim)
        self._q_on_host = runtime.pinned(*q_shape, dtype=dtype)
        self._o_on_host = runtime.pinned(*o_shape, dtype=dtype)
        self._q = torch.empty(q_shape, dtype=dtype, device=runtime.device)
        # Only its shapes and dtypes: a fill would run on another stream than frames, perhaps after the first.
        shapes = State.identity(rows, heads, spec.v_dim, dtype=dtype, device="meta")
        self._out = State(*(torch.empty_like(field, device=runtime.device) for field in shapes))
        self._lse_on_host = runtime.pinned(rows, heads, dtype=self._out.lse.dtype)

    def fits(self, rows: int, heads: int, dtype: torch.dtype) -> bool:
        """Whether the memory is that of such frames."""
        return self._out.o.shape[:2] == (rows, heads) and self._out.o.dtype == dtype

    @property
    def q(self) -> Tensor:
        """[rows, heads, k_dim] in host memory, to be overwritten."""
        return self._q_on_host.write()

    def attend(self, kernels: Kernels[Any], plan: Any, layer: int) -> State:
        """Computes the state of :attr:`q` by the plan's ``layer``. Returns it in host memory, where it stays
        until the next call. Raises the kernels' ValueError."""
        stream = self._stream
        try:
            stream.upload(self._q_on_host, self._q)
            stream.run(partial(kernels.partial, plan, layer, self._q, out=self._out))
            stream.download(self._out.o, self._o_on_host)
            stream.download(self._out.lse, self._lse_on_host)
        finally:
            # After an error, too: the memory may be given to others then.
            stream.record().wait()
        return State(self._o_on_host.read(), self._lse_on_host.read())
