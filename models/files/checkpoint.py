"""Chooses the safetensors files of a Hugging Face folder, as transformers does.

Called by ``weights.safetensors``. Two sets of files may lie side by
side; reading another set than transformers would serve another model without a word. It must not know a
model's tensors or import torch.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from farshore.errors import ModelError
from farshore.models.files.source import read_json

SUPPORTED = "bf16, f16 and f32 safetensors, and GGUF files"

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors")
_METHODS = {
    "lora_A": "a LoRA adapter",
    "lora_B": "a LoRA adapter",
    "qweight": "AWQ or GPTQ",
    "qzeros": "AWQ or GPTQ",
    "g_idx": "GPTQ",
    "weight_scale": "FP8 or compressed-tensors",
    "weight_scale_inv": "FP8",
    "weight_packed": "compressed-tensors",
    "weight_zero_point": "compressed-tensors",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "quant_state": "bitsandbytes",
    "SCB": "bitsandbytes",
}
"""Component of a tensor's name → the kind of checkpoint that has such tensors."""


class Checkpoint(NamedTuple):
    """The files to read, in the order in which transformers reads them."""

    files: tuple[Path, ...]
    weight_map: Mapping[str, str] | None
    """Tensor → name of its file, by the index; None for a single file."""


def choose(folder: Path) -> Checkpoint:
    """Raises ModelError if transformers finds no safetensors either, if the index is damaged, and for
    adapters."""
    adapter = next((name for name in _ADAPTERS if (folder / name).is_file()), None)
    if adapter is not None:
        raise ModelError(
            f"{folder / adapter}: LoRA adapters are unsupported; merge it with peft's merge_and_unload, or "
            f"move the adapter's files away to serve the base model; supported: {SUPPORTED}"
        )
    chosen = _named_by(read_json(folder / "config.json"), folder)
    if chosen is None:
        chosen = next((name for name in (_SINGLE, _INDEX) if (folder / name).is_file()), None)
    if chosen is None:
        raise ModelError(f"{folder}: no {_SINGLE}, nor {_INDEX}; {_fix(folder)}")
    if not chosen.endswith(".index.json"):
        return Checkpoint((folder / chosen,), None)
    weight_map = _weight_map(folder / chosen)
    return Checkpoint(tuple(folder / name for name in sorted(set(weight_map.values()))), weight_map)


def refuse_foreign(tensors: Iterable[str], where: Path) -> None:
    """Raises ModelError if the tensors' names are those of an adapter or of a quantised checkpoint."""
    for tensor in tensors:
        for component in tensor.split("."):
            if method := _METHODS.get(component):
                raise ModelError(
                    f"{where}: {tensor!r:.120} belongs to {method}, which is unsupported; "
                    f"supported: {SUPPORTED}"
                )


def _named_by(config: Mapping[str, Any], folder: Path) -> str | None:
    """The file or index that ``transformers_weights`` in config.json names; None if it names none."""
    name = config.get("transformers_weights")
    if name is None:
        return None
    if (
        not isinstance(name, str)
        or Path(name).name != name
        or not name.endswith((".safetensors", ".safetensors.index.json"))
        or not (folder / name).is_file()
    ):
        raise ModelError(
            f"{folder / 'config.json'}: 'transformers_weights' must name a safetensors file or an index "
            f"beside it, not {name!r:.80}; download the model again"
        )
    return name


def _fix(folder: Path) -> str:
    if any(folder.glob("consolidated*.safetensors")):
        return (
            "consolidated.safetensors is in Mistral's own format: get the model.safetensors files of the "
            "same repository"
        )
    if any(folder.glob("pytorch_model*.bin")):
        return "pytorch_model.bin is unsupported: convert it with transformers' save_pretrained"
    if any(folder.glob("*.safetensors")):
        return "other *.safetensors are not read, as in transformers: get the index, or rename a single file"
    return "download the model again, or convert it with transformers' save_pretrained"


def _weight_map(index: Path) -> dict[str, str]:
    files = read_json(index).get("weight_map")
    # Plain file names only: an index must not point outside of its folder.
    if (
        not isinstance(files, dict)
        or not files
        or not all(isinstance(file, str) and Path(file).name == file for file in files.values())
    ):
        raise ModelError(f"{index}: 'weight_map' must name files beside it; download it again")
    return files
