"""Addresses for native code are those of host memory."""

import re

import pytest
import torch

from farshore.kernels.base import State
from farshore.kernels.host import HOST, address


def test_an_address_is_that_of_the_first_element():
    x = torch.arange(12, dtype=torch.int32, device=HOST)
    assert address(x[3:]) == address(x) + 3 * x.itemsize == x.data_ptr() + 12


def test_a_tensor_of_another_device_is_refused():
    x = torch.empty(2, 3, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match=re.escape("torch.bfloat16 (2, 3) on meta: copy it to the CPU")):
        address(x)


def test_an_identity_lies_where_it_was_asked_for():
    o, lse = State.identity(2, 3, 4, device="meta")
    assert (o.device.type, lse.device.type) == ("meta", "meta")
