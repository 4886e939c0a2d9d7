"""Loads a :class:`Llama` from model files of two formats: names, shapes and row orders.

Called once by each dense worker. A missing tensor, a wrong shape or a damaged file is a ModelError of one
line at loading, instead of a wrong result later. It must not know how the weights are used.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from farshore.errors import ModelError
from farshore.models.config.gguf import from_gguf
from farshore.models.config.load import load_config
from farshore.models.config.model import ModelConfig
from farshore.models.files.gguf import GgufFile
from farshore.models.files.source import ModelSource
from farshore.models.llama import LayerWeights, Llama, LlamaWeights, Matrix
from farshore.models.weights.gguf import GgufReader, Quantised
from farshore.models.weights.names import expected_shapes
from farshore.models.weights.safetensors import SafetensorsReader

Progress = Callable[[int, int], None]
"""(tensors read so far, tensors in all)."""


class _Tensors(Protocol):
    """A model's tensors under our names: ``embed``, ``norm``, ``head``, and by layer ``3.q``,
    ``3.q_bias``."""

    def read(self, name: str) -> tuple[str, Tensor]:
        """(file and tensor name, for messages; the tensor in the file's precision or in float32)."""

    def blocks(self, name: str) -> Quantised | None:
        """A matrix in the file's quantised form; None if it has none."""


def load_model(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    config: ModelConfig | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
) -> Llama:
    """Loads a model, converting its weights to ``dtype`` tensor by tensor. For bfloat16 on native kernels,
    quantised matrices of the types that these read stay quantised; for float32 all are dequantised.

    ``config`` replaces the model's own, for example to allow more positions; its shapes must fit the files.
    ``progress`` is called after every tensor. ``threads``: number of threads of the native kernels, if these
    are used; None: PyTorch's number. Raises ModelError, which names the file and the fix.
    """
    tensors: _Tensors
    if source.kind == "gguf":
        # The file is parsed once, for configuration and weights.
        file = GgufFile.open(source.path)
        config = config or from_gguf(file, source.name)
        tensors = GgufReader(file, config)
    else:
        config = config or load_config(source)
        tensors = SafetensorsReader(Path(source.path))
    native = _native(dtype, torch.device(device))
    threads = threads or torch.get_num_threads()
    shapes = expected_shapes(config)
    loaded: dict[str, Matrix] = {}
    for done, (name, shape) in enumerate(shapes.items(), start=1):
        where, matrix = _read(tensors, name, native, dtype, threads)
        if tuple(matrix.shape) != shape:
            raise ModelError(
                f"{where} has shape {list(matrix.shape)}, the configuration says {list(shape)}; "
                "take weights and configuration from the same model"
            )
        if isinstance(matrix, Tensor):
            # It may be a view of a memory-mapped file: a copy lets the file close.
            matrix = torch.empty(shape, dtype=dtype, device=device).copy_(matrix)
        loaded[name] = matrix
        if progress is not None:
            progress(done, len(shapes))
    weights = _assembled(config, loaded)
    if native is None:
        return Llama(config, weights)
    return native.NativeLlama(config, weights, threads=threads)


def _read(tensors: _Tensors, name: str, native: Any, dtype: torch.dtype, threads: int) -> tuple[str, Matrix]:
    """(file and tensor name, for messages; the tensor as ``_Tensors.read`` gives it, or packed)."""
    stored = tensors.blocks(name) if native is not None else None
    if stored is not None:
        where, kind, rows = stored
        matrix = native.matrix(kind, rows, dtype=dtype, threads=threads)
        if matrix is not None:
            return where, matrix
    return tensors.read(name)


def _native(dtype: torch.dtype, device: torch.device) -> Any:
    """The module ``native_llama``; None if the native kernels were not built or do not take this dtype or
    device."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return None
    try:
        return import_module("farshore.models.native_llama")
    except ImportError:
        # kernels.select misses them too, and reports that and its cost.
        return None


def _assembled(config: ModelConfig, loaded: Mapping[str, Any]) -> LlamaWeights:
    layers = tuple(
        LayerWeights(**{field: loaded.get(f"{layer}.{field}") for field in LayerWeights._fields})
        for layer in range(config.layers)
    )
    embed = loaded["embed"]
    return LlamaWeights(embed=embed, layers=layers, norm=loaded["norm"], head=loaded.get("head", embed))
