"""What `bits` and `memory` may be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from liquidfusion.exceptions import ConfigError
from liquidfusion.precision import Bits, bytes_of, slots_in


@pytest.mark.parametrize(
    ("given_bits", "expected"),
    [
        (16, (16, 16)),
        (8, (8, 8)),
        (4, (4, 4)),
        ((4, 2), (4, 2)),
        ([8, 4], (8, 4)),
        ((16, 2), (16, 2)),
        (np.int64(4), (4, 4)),
        ("4", (4, 4)),
        ("4, 2", (4, 2)),
    ],
)
def test_bits(given_bits, expected):
    bits = Bits.of(given_bits)
    assert (bits.keys, bits.values) == expected
    assert Bits.of(bits.given) == bits
    assert bits.coded == (expected != (16, 16))


def test_no_bits_are_the_models_own():
    assert Bits.of(None) is None


@pytest.mark.parametrize(
    "wrong", [5, 2, 0, -4, "q4", "", True, 4.0, (4,) * 3, (2, 4), (4, 3), (), "4,q", {4: 2}, object(), (None, 4)]
)
def test_other_bits_are_one_clear_line(wrong):
    with pytest.raises(ConfigError) as error:
        Bits.of(wrong)
    text = str(error.value)
    assert text.startswith(f"bits={wrong!r}; ")
    assert "16, 8, 4 or a pair" in text
    assert "\n" not in text


def test_bits_of_a_side():
    with pytest.raises(ConfigError, match="bits of keys"):
        Bits(2, 2)
    with pytest.raises(ConfigError, match="bits of values"):
        Bits(4, 3)


def test_raised_keys():
    assert Bits(4, 2).raised() == Bits(8, 2)
    assert Bits(16, 4).raised() == Bits(16, 4)


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (1000, 1000),
        ("1000", 1000),
        ("512MiB", 512 * 2**20),
        ("512 mib", 512 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("3 kB", 3000),
        (" 7 B ", 7),
        ("2TiB", 2 * 2**40),
        (np.int32(9), 9),
    ],
)
def test_memory(memory, expected):
    assert bytes_of(memory) == expected


@pytest.mark.parametrize("wrong", ["2 elephants", "", "MiB", "-3MiB", "1e3", "1,5GB", 1.5, None, True, (1,), "5 i B"])
def test_other_memory_is_one_clear_line(wrong):
    with pytest.raises(ConfigError) as error:
        bytes_of(wrong)
    text = str(error.value)
    assert text.startswith(f"memory={wrong!r}; bytes, or a number with one of ")
    assert "\n" not in text


@pytest.mark.parametrize("wrong", [0, -1, "0MiB", 2**63, "99999999999TiB"])
def test_memory_out_of_range(wrong):
    with pytest.raises(ConfigError, match="from 1 to"):
        bytes_of(wrong)


@given(per_slot=st.integers(1, 10**6), fixed=st.integers(0, 10**6), memory=st.integers(1, 2**40))
def test_as_many_slots_as_fit(per_slot, fixed, memory):
    def nbytes(slots):
        return fixed + per_slot * slots

    if nbytes(8) > memory:
        with pytest.raises(ConfigError, match=f"{nbytes(8)} bytes"):
            slots_in(memory, nbytes, 8)
        return
    slots = slots_in(memory, nbytes, 8)
    assert nbytes(slots) <= memory < nbytes(slots + 1)


def test_memory_that_is_never_used_up():
    assert slots_in("1MiB", lambda _: 5, 8) >= 2**62
