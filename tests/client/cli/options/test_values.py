"""Types of option values."""

import argparse

import pytest

from farshore.client.cli.options.values import server_address, size_bytes


@pytest.mark.parametrize(
    ("text", "expected_bytes"),
    [
        ("1073741824", 1 << 30),
        ("1GiB", 1 << 30),
        ("512MiB", 512 << 20),
        ("512mib", 512 << 20),
        ("2g", 2 << 30),
        ("64 k", 64 << 10),
        ("1.5GiB", 3 << 29),
        ("1TiB", 1 << 40),
        ("3GB", 3_000_000_000),
        ("7B", 7),
    ],
)
def test_sizes(text, expected_bytes):
    assert size_bytes(text) == expected_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1g", "1 gigabyte", "1x", "1iB", "1Gi", "0x10", "1e9", "nan"])
def test_bad_sizes_name_the_form(text):
    with pytest.raises(argparse.ArgumentTypeError, match="such as 512MiB"):
        size_bytes(text)


@pytest.mark.parametrize("text", ["127.0.0.1:50051", "[::1]:50051", "localhost:1", "a.example:65535"])
def test_addresses(text):
    assert server_address(text) == text
