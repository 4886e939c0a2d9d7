"""A graph of PyTorch's calls on the CPU: records what some work launches, and repeats it on the same memory.

Called by the deferring runtime. Like a captured CUDA graph, a repetition calls none of the work's own code:
numbers and tensors that it took from elsewhere stay as they were. It must not know streams.
"""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from farshore.kernels.host import address
from farshore.kernels.runtime.base import Work


class RecordedWork:
    """The calls of one run of ``work``, which the constructor makes."""

    def __init__(self, work: Work) -> None:
        with _Recorder() as recorder:
            work()
        self._calls = recorder.calls

    def repeat(self) -> None:
        """Makes the recorded calls again. A call that returned a new tensor writes to that tensor."""
        for call, args, kwargs, results in self._calls:
            repeated = tree_leaves(call(*args, **kwargs))
            for before, now in zip(tree_leaves(results), repeated, strict=True):
                # Views, and results that were written in place, are the same memory.
                if isinstance(before, Tensor) and address(before) != address(now):
                    before.copy_(now)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, results))
        return results
