"""Loads a :class:`Llama` from model files of two formats: names, shapes and row orders.

Called once by each dense worker. A missing tensor, a wrong shape or a damaged file is a ModelError of one
line at loading, instead of a wrong result later. It must not know how the weights are used.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from farshore.errors import ModelError
from farshore.kernels.host import HOST
from farshore.kernels.select import device_runtime
from farshore.models.config.gguf import from_gguf
from farshore.models.config.load import load_config
from farshore.models.config.model import ModelConfig
from farshore.models.device_llama import DeviceLlama, joined
from farshore.models.files.gguf import GgufFile
from farshore.models.files.source import ModelSource
from farshore.models.llama import LayerWeights, Llama, LlamaWeights, Matrix, as_tensor
from farshore.models.weights.content import Content, user_cache
from farshore.models.weights.gguf import GgufReader
from farshore.models.weights.names import expected_shapes
from farshore.models.weights.safetensors import SafetensorsReader
from farshore.models.weights.stored import Reader, Update
from farshore.models.weights.upload import Uploads

Progress = Callable[[int, int], None]
"""(tensors read so far, tensors in all)."""
_MOST_READERS = 8
"""Threads that read, hash and convert tensors. Disks need few; hashing needs a core for each 1 to 2 GB/s."""


def load_model(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    config: ModelConfig | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
) -> Llama:
    """Loads a model, converting its weights to ``dtype`` piece by piece, and computes its content. For
    bfloat16 on native kernels, quantised matrices of the types that these read stay quantised; for float32
    all are dequantised.

    ``config`` replaces the model's own, for example to allow more positions; its shapes must fit the files.
    To another ``device`` than the CPU, tensors are copied while others are read. ``progress`` is called after
    every tensor. ``threads``: number of threads of the native kernels, if these are used, and most threads
    that read; None: PyTorch's number. Raises ModelError, which names the file and the fix.
    """
    tensors: Reader
    if source.kind == "gguf":
        # The file is parsed once, for configuration and weights.
        file = GgufFile.open(source.path)
        config = config or from_gguf(file, source.name)
        tensors = GgufReader(file, config)
    else:
        config = config or load_config(source)
        tensors = SafetensorsReader(Path(source.path))
    threads = threads or torch.get_num_threads()
    content = Content(user_cache())
    with closing(tensors):
        native = _native(dtype, torch.device(device))
        uploads = None if torch.device(device) == HOST else Uploads(device_runtime(torch.device(device)))
        job = _Job(tensors, native, dtype, uploads, threads)
        loaded = job.run(_wanted(config, tensors), content, progress)
        config = _tied(config, loaded)
    if uploads is not None:
        model: Llama = DeviceLlama(config, _assembled(config, loaded, each=joined))
    elif native is None:
        model = Llama(config, _assembled(config, loaded))
    else:
        model = native.NativeLlama(config, _assembled(config, loaded), threads=threads)
    model.content = content.digest(config, str(dtype))
    return model


class _Job(NamedTuple):
    """How tensors are read."""

    tensors: Reader
    native: Any
    dtype: torch.dtype
    uploads: Uploads | None
    """None for a model on the host."""
    threads: int

    def run(
        self, shapes: Mapping[str, tuple[int, ...]], content: Content, progress: Progress | None
    ) -> dict[str, Matrix]:
        """Reads the tensors in the order of the files."""
        found = {name: self.tensors.find(name) for name in shapes}
        for name, stored in found.items():
            if stored.shape != shapes[name]:
                raise ModelError(
                    f"{stored} has shape {list(stored.shape)}, the configuration says {list(shapes[name])}; "
                    "take weights and configuration from the same model"
                )
        names = sorted(found, key=lambda name: (found[name].path, found[name].offset))
        hashes = {name: content.start(name, found[name]) for name in names}
        loaded: dict[str, Matrix] = {}
        pool = ThreadPoolExecutor(min(self.threads, _MOST_READERS), thread_name_prefix="weights")
        try:
            results = pool.map(lambda name: self._read(name, hashes[name].update), names)
            for done, (name, matrix) in enumerate(zip(names, results, strict=True), start=1):
                loaded[name] = matrix
                if progress is not None:
                    progress(done, len(names))
        finally:
            pool.shutdown(cancel_futures=True)
        return loaded

    def _read(self, name: str, update: Update) -> Matrix:
        """The tensor; as the file quantises it if the native kernels compute with that."""
        stored = self.tensors.blocks(name) if self.native is not None else None
        matrix: Matrix | None = None
        if stored is not None:
            matrix = self.native.matrix(stored.kind, stored.rows, dtype=self.dtype, threads=self.threads)
        if stored is None or matrix is None:
            values = self.tensors.read(name, self.dtype, update)
            matrix = values if self.uploads is None else self.uploads.upload(values)
        else:
            update(stored.stored)
        self.tensors.release(name)
        return matrix


def _wanted(config: ModelConfig, tensors: Reader) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors to read. With tied embeddings: either of the two, or both."""
    shapes = expected_shapes(config)
    if config.tied_embeddings and tensors.has("head"):
        shapes["head"] = shapes["embed"]
        if not tensors.has("embed"):
            del shapes["embed"]
    return shapes


def _tied(config: ModelConfig, loaded: dict[str, Matrix]) -> ModelConfig:
    """Ties the embeddings as transformers does: if the configuration says so, unless the file has two tensors
    that differ. Returns the configuration of what was loaded."""
    if config.tied_embeddings and "head" in loaded:
        head = loaded.pop("head")
        embed = loaded.setdefault("embed", head)
        if embed is not head and not torch.equal(as_tensor(head), as_tensor(embed)):
            loaded["head"] = head
            return replace(config, tied_embeddings=False)
    return config


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


def _assembled(
    config: ModelConfig,
    loaded: dict[str, Any],
    *,
    each: Callable[[LayerWeights], LayerWeights] = lambda layer: layer,
) -> LlamaWeights:
    """Takes the tensors out of ``loaded``, so that a layer's are freed where ``each`` replaces them."""
    layers = tuple(
        each(LayerWeights(**{field: loaded.pop(f"{layer}.{field}", None) for field in LayerWeights._fields}))
        for layer in range(config.layers)
    )
    embed = loaded["embed"]
    return LlamaWeights(embed=embed, layers=layers, norm=loaded["norm"], head=loaded.get("head", embed))
