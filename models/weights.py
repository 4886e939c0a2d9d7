"""Loads a :class:`Llama` from model files of two formats: names, shapes and row orders.

Called once by each dense worker. A missing tensor, a wrong shape or a damaged file is a ModelError of one
line at loading, instead of a wrong result later. It must not know how the weights are used.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from farshore.errors import ModelError
from farshore.models.config import ModelConfig, load_config
from farshore.models.gguf_file import GgufFile
from farshore.models.llama import LayerWeights, Llama, LlamaWeights
from farshore.models.source import ModelSource, read_json

Progress = Callable[[int, int], None]
"""(tensors read so far, tensors in all)."""

Quantised = tuple[str, str, Tensor]
"""(file and tensor name, for messages; ggml's name of the type; u8 [out, bytes of a row])."""

# Our name → (Hugging Face's, ggml's), between the layer's prefix and ".weight" or ".bias".
_MATRICES = {
    "attention_norm": ("input_layernorm", "attn_norm"),
    "q": ("self_attn.q_proj", "attn_q"),
    "k": ("self_attn.k_proj", "attn_k"),
    "v": ("self_attn.v_proj", "attn_v"),
    "o": ("self_attn.o_proj", "attn_output"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
    "gate": ("mlp.gate_proj", "ffn_gate"),
    "up": ("mlp.up_proj", "ffn_up"),
    "down": ("mlp.down_proj", "ffn_down"),
}
_ATTENTION = ("q", "k", "v", "o")
_MLP = ("gate", "up", "down")


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
    """Loads a model, converting its weights to ``dtype`` tensor by tensor.

    ``config`` replaces the model's own, for example to allow more positions; its shapes must fit the files.
    ``progress`` is called after every tensor. ``threads``: number of threads of the native kernels, if these
    are used; None: PyTorch's number. Raises ModelError, which names the file and the fix.
    """
    tensors: _Tensors
    if source.kind == "gguf":
        # The file is parsed once, for configuration and weights.
        file = GgufFile.open(source.path)
        config = config or ModelConfig.from_gguf(file, source.name)
        tensors = _Gguf(file, config)
    else:
        config = config or load_config(source)
        tensors = _Safetensors(Path(source.path))
    native = _native(dtype, torch.device(device))
    threads = threads or torch.get_num_threads()
    shapes = expected_shapes(config)
    loaded: dict[str, Tensor] = {}
    blocks: dict[str, Any] = {}
    for done, (name, shape) in enumerate(shapes.items(), start=1):
        stored = tensors.blocks(name) if native is not None else None
        quantised = native.Blocks.of(*stored[1:]) if stored is not None else None
        if quantised is not None:
            where, tensor = stored[0], quantised.unpack(dtype, threads=threads)
            blocks[name] = quantised
        else:
            where, tensor = tensors.read(name)
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"{where} has shape {list(tensor.shape)}, the configuration says {list(shape)}; "
                "take weights and configuration from the same model"
            )
        # A tensor that was not unpacked may be a view of a memory-mapped file: a copy lets the file close.
        unpacked = quantised is not None
        loaded[name] = tensor if unpacked else torch.empty(shape, dtype=dtype, device=device).copy_(tensor)
        if progress is not None:
            progress(done, len(shapes))
    weights = _assembled(config, loaded)
    if native is None:
        return Llama(config, weights)
    return native.NativeLlama(config, weights, blocks=blocks, threads=threads)


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


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that the model needs, by our names, in the order of reading."""
    q, kv = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
    rows = {"q": q, "k": kv, "v": kv, "o": config.hidden}
    rows |= {"gate": config.intermediate, "up": config.intermediate, "down": config.hidden}
    columns = dict.fromkeys(rows, config.hidden) | {"o": q, "down": config.intermediate}
    biased = (_ATTENTION if config.attention_bias else ()) + (_MLP if config.mlp_bias else ())
    shapes: dict[str, tuple[int, ...]] = {"embed": (config.vocab, config.hidden)}
    for layer in range(config.layers):
        for field in _MATRICES:
            shape = (rows[field], columns[field]) if field in rows else (config.hidden,)
            shapes[f"{layer}.{field}"] = shape
        shapes |= {f"{layer}.{field}_bias": (rows[field],) for field in biased}
    shapes["norm"] = (config.hidden,)
    if not config.tied_embeddings:
        shapes["head"] = (config.vocab, config.hidden)
    return shapes


def _assembled(config: ModelConfig, loaded: Mapping[str, Tensor]) -> LlamaWeights:
    layers = tuple(
        LayerWeights(**{field: loaded.get(f"{layer}.{field}") for field in LayerWeights._fields})
        for layer in range(config.layers)
    )
    embed = loaded["embed"]
    return LlamaWeights(embed=embed, layers=layers, norm=loaded["norm"], head=loaded.get("head", embed))


class _Safetensors:
    """A Hugging Face directory: one ``model.safetensors``, or several files and an index."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            names = set(_weight_map(index).values())
        else:
            names = {path.name for path in folder.glob("*.safetensors")}
        if not names:
            raise ModelError(f"{folder}: no *.safetensors; convert it with transformers' save_pretrained")
        self._folder = folder
        self._files = {}
        self._where: dict[str, str] = {}
        for name in sorted(names):
            try:
                file = safe_open(folder / name, framework="pt")
                self._where |= dict.fromkeys(file.keys(), name)
            except (SafetensorError, OSError) as error:
                detail = (
                    "missing" if isinstance(error, FileNotFoundError) else f"damaged or cut short ({error})"
                )
                raise ModelError(f"{folder / name}: {detail}; download it again") from error
            self._files[name] = file

    def read(self, name: str) -> tuple[str, Tensor]:
        full = _hf_name(name)
        if full not in self._where:
            raise ModelError(f"{self._folder}: tensor {full!r} is missing; download the model again")
        file = self._where[full]
        try:
            tensor = self._files[file].get_tensor(full)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{self._folder / file}: {full!r} can't be read ({error}); download it again"
            ) from error
        if not tensor.is_floating_point():
            raise ModelError(f"{self._folder / file}: {full!r} is {tensor.dtype}; use an unquantised model")
        return f"{self._folder / file}: {full!r}", tensor

    def blocks(self, name: str) -> None:
        return None


class _Gguf:
    """A GGUF file. Tensors are dequantised to float32; rows of Q and K are put into Hugging Face's order."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self._file = file
        self._heads = {"q": config.q_heads, "k": config.kv_heads}

    def read(self, name: str) -> tuple[str, Tensor]:
        full = _gguf_name(name)
        return f"{self._file.path}: {full!r}", torch.from_numpy(self._in_order(name, self._file.tensor(full)))

    def blocks(self, name: str) -> Quantised | None:
        full = _gguf_name(name)
        kind, rows = self._file.blocks(full)
        if rows.ndim != 2:
            return None
        # A copy, because PyTorch warns about read-only memory.
        return f"{self._file.path}: {full!r}", kind, torch.from_numpy(self._in_order(name, rows).copy())

    def _in_order(self, name: str, rows: np.ndarray) -> np.ndarray:
        field = name.rpartition(".")[2].removesuffix("_bias")
        if field in self._heads and rows.shape[0] % (2 * self._heads[field]) == 0:
            return _halves(rows, self._heads[field])
        return rows


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of Q or K: ggml's llama rotates adjacent rows of a head as a pair, and we rotate rows
    i and i + head_dim/2."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _hf_name(name: str) -> str:
    global_names = {
        "embed": "model.embed_tokens.weight",
        "norm": "model.norm.weight",
        "head": "lm_head.weight",
    }
    if name in global_names:
        return global_names[name]
    layer, _, field = name.partition(".")
    return f"model.layers.{layer}.{_MATRICES[field.removesuffix('_bias')][0]}.{_suffix(field)}"


def _gguf_name(name: str) -> str:
    global_names = {"embed": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}
    if name in global_names:
        return global_names[name]
    layer, _, field = name.partition(".")
    return f"blk.{layer}.{_MATRICES[field.removesuffix('_bias')][1]}.{_suffix(field)}"


def _suffix(field: str) -> str:
    return "bias" if field.endswith("_bias") else "weight"


def _weight_map(index: Path) -> dict[str, str]:
    files = read_json(index).get("weight_map")
    # Plain file names only: an index must not point outside of its folder.
    if not isinstance(files, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in files.values()
    ):
        raise ModelError(f"{index}: 'weight_map' must name files beside it; download it again")
    return files
