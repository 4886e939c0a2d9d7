"""Reads tensors from a Hugging Face directory's safetensors files.

Called by ``load``. It must not know a model's shapes.
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from farshore.errors import ModelError
from farshore.models.files.source import read_json
from farshore.models.weights.names import hf_name


class SafetensorsReader:
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
        full = hf_name(name)
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


def _weight_map(index: Path) -> dict[str, str]:
    files = read_json(index).get("weight_map")
    # Plain file names only: an index must not point outside of its folder.
    if not isinstance(files, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in files.values()
    ):
        raise ModelError(f"{index}: 'weight_map' must name files beside it; download it again")
    return files
