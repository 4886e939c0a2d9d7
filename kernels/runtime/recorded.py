"""A graph of calls on the CPU: records what some work launches, and repeats it on the same memory.

Called by the deferring runtime. Like a captured CUDA graph, a repetition calls none of the work's own code:
numbers and tensors that it took from elsewhere stay as they were. PyTorch's calls are recorded, and the
launches of triton's interpreter; native code is not. It must not know streams.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from farshore.kernels.host import address
from farshore.kernels.runtime.base import Work

_RECORDING = threading.Lock()
"""Held while triton's interpreter is changed for a recording."""


class RecordedWork:
    """The calls of one run of ``work``, which the constructor makes."""

    def __init__(self, work: Work) -> None:
        recorder = _Recorder()
        with recorder.launches(), recorder:
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
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []
        self._thread = threading.get_ident()
        self._launching = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if not self._launching:
            self.calls.append((func, args, kwargs or {}, results))
        return results

    def launch(self, run: Callable[..., Any], kernel: Any, *args: Any, **options: Any) -> None:
        """Records a launch of this thread as one call, whatever the interpreter calls for it."""
        if threading.get_ident() != self._thread:
            run(kernel, *args, **options)
            return
        self._launching = True
        try:
            run(kernel, *args, **options)
        finally:
            self._launching = False
        self.calls.append((partial(run, kernel), args, options, None))

    @contextmanager
    def launches(self) -> Iterator[None]:
        """Sees the launches of triton's interpreter, if this process has one."""
        interpreter: Any = sys.modules.get("triton.runtime.interpreter")
        if interpreter is None:
            yield
            return
        with _RECORDING:
            function = interpreter.InterpretedFunction
            run = function.run
            function.run = lambda kernel, *args, **options: self.launch(run, kernel, *args, **options)
            try:
                yield
            finally:
                function.run = run
