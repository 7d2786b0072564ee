"""Sizes as people type them."""

import pytest

from loadstone.units import parse_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5_000_000_000),
        ("500 MB", 500_000_000),
        ("2GiB", 2 << 30),
        ("1.5g", 1_500_000_000),
        ("0.1TB", 100_000_000_000),
        ("64KiB", 65536),
        ("12kb", 12_000),
        ("1234", 1234),
        (" 7B ", 7),
        (10**20, 10**20),
    ],
)
def test_sizes_are_read_exactly(text: str | int, nbytes: int) -> None:
    assert parse_bytes(text, option="--size") == nbytes


@pytest.mark.parametrize("text", ["", "GB", "five GB", "-1GB", "1e9", "0", "0.1", "5iB", "5 XB", "٣GB", "1_000"])
def test_what_is_no_size_is_named_with_its_option(text: str) -> None:
    with pytest.raises(ValueError, match=r"^--size: expected a size such as 5GB, 500MB or 2GiB, found "):
        parse_bytes(text, option="--size")
