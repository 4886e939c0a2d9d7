"""Every new tensor names its device, and native code gets addresses of host memory only.

A tensor without a device lies on the CPU. Beside tensors of a GPU, it raises at the first call that mixes
them; native code that is given a GPU's address reads some other memory. Neither shows on a machine without a
GPU.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("attention_offload", "kernels", "kvstore", "models", "workers")
"""The paths of the engine and the shards."""
NEW_TENSORS = {
    *(
        "arange",
        "as_tensor",
        "asarray",
        "empty",
        "empty_strided",
        "eye",
        "full",
        "linspace",
        "logspace",
        "ones",
    ),
    *("rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices"),
    *("zeros", "Generator"),
}
"""Functions of torch that put their result on the CPU unless ``device`` is given."""
MAY_TAKE_ADDRESSES = ("kernels/host.py", "kernels/cpu/native_module.py")
"""The first checks the device; the second tells it to native code, which checks it."""


def without_device(text):
    """The lines that make a tensor and name no device. A function of torch may also be the first argument of
    a call that has one: ``partial(torch.empty, device=...)``."""
    tree = ast.parse(text)
    named = set()
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and any(keyword.arg == "device" for keyword in call.keywords):
            named |= {call.func, *call.args[:1]}
    return [
        node.lineno
        for node in ast.walk(tree)
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
            and node.attr in NEW_TENSORS
            and node not in named
        )
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "torch"
            and any(alias.name in NEW_TENSORS for alias in node.names)
        )
        or (
            isinstance(node, ast.Import)
            and any(alias.name == "torch" and alias.asname is not None for alias in node.names)
        )
    ]


def found_in_product(find):
    """{"file:line"} of everything that ``find`` finds."""
    files = {
        str(file.relative_to(ROOT)): file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")
    }
    assert len(files) > 100 and set(MAY_TAKE_ADDRESSES) <= set(files)
    return {f"{name}:{line}" for name, file in files.items() for line in find(file.read_text())}


def test_every_new_tensor_names_its_device():
    assert found_in_product(without_device) == set()


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("torch.empty(3)", 1),
        ("torch.empty(3, device=x.device)", 0),
        ("torch.tensor([torch.ones(3)], device=x.device)", 1),
        ("partial(torch.empty, dtype=d)", 1),
        ("partial(torch.empty, device=d)", 0),
        ("make(3, torch.empty, device=d)", 1),
        ("from torch import zeros", 1),
        ("import torch as t", 1),
        ("from torch import Tensor", 0),
        ("torch.empty_like(x) + x.new_zeros(3) + torch.cat([x])", 0),
    ],
)
def test_the_rule_finds(line, count):
    assert len(without_device(line)) == count


def test_addresses_are_taken_where_the_device_is_checked():
    def addresses(text):
        return [
            node.lineno
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Attribute) and node.attr == "data_ptr"
        ]

    assert {found.split(":")[0] for found in found_in_product(addresses)} == set(MAY_TAKE_ADDRESSES)
