"""How many bits a slot takes, and how many slots a number of bytes buys: what users say, checked before any work."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from liquidfusion.exceptions import ConfigError

KEY_BITS = (16, 8, 4)
"""Bits that a coordinate of a key may take."""

VALUE_BITS = (16, 8, 4, 2)
"""Bits that a coordinate of a value may take."""

UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", 1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}
"""Bytes of each unit that `memory` may be given in."""

_MEMORY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Bits:
    """Bits of a coordinate of a key and of a value; 16 stands for a 16-bit float, fewer for codes.

    Raises
    ------
    ConfigError
        Bits that are not among `KEY_BITS` and `VALUE_BITS`.
    """

    keys: int
    values: int

    def __post_init__(self) -> None:
        for name, bits, accepted in (("keys", self.keys, KEY_BITS), ("values", self.values, VALUE_BITS)):
            if bits not in accepted:
                raise ConfigError(f"bits of {name} must be one of {list(accepted)}, got {bits!r}")

    @classmethod
    def of(cls, bits: Any) -> Bits | None:
        """What `bits` says.

        Parameters
        ----------
        bits : int, pair of int, str or None
            16, 8 or 4 for both sides, or (keys, values); as a text of the command line `"4"` or `"4,2"`. None, the
            model's own dtype, stays None.

        Raises
        ------
        ConfigError
            Anything else, in one line that says what came and what is accepted.
        """
        if bits is None:
            return None
        parts = bits
        if isinstance(bits, str):
            parts = bits.split(",")
        elif not isinstance(bits, (tuple, list)):
            parts = (bits,)
        numbers = [_number(part) for part in parts]
        if len(numbers) == 1 and numbers[0] in KEY_BITS:
            return cls(numbers[0], numbers[0])
        if len(numbers) == 2 and numbers[0] in KEY_BITS and numbers[1] in VALUE_BITS:
            return cls(numbers[0], numbers[1])
        raise ConfigError(
            f"bits={bits!r}; None, 16, 8, 4 or a pair (keys, values) from {list(KEY_BITS)} and {list(VALUE_BITS)} "
            "are accepted"
        )

    @property
    def coded(self) -> bool:
        """Whether a side is held as codes."""
        return min(self.keys, self.values) < 16

    @property
    def given(self) -> int | tuple[int, int]:
        """As a user gives it."""
        return self.keys if self.keys == self.values else (self.keys, self.values)

    def raised(self) -> Bits:
        """The same with keys of 8 bits or more, for a layer whose keys fewer would spoil."""
        return Bits(max(self.keys, 8), self.values)


def bytes_of(memory: Any) -> int:
    """What `memory` says, in bytes.

    Parameters
    ----------
    memory : int or str
        Bytes, or a number with one of `UNITS`, as `"512MiB"` or `"1.5 GB"`; units in any case.

    Raises
    ------
    ConfigError
        Anything else, or no byte at all.
    """
    size = _number(memory)
    if size is None and isinstance(memory, str):
        found = _MEMORY.fullmatch(memory)
        units = {unit.lower(): size for unit, size in UNITS.items()}
        if found and found[2].lower() in units:
            size = int(float(found[1]) * units[found[2].lower()])
    if size is None:
        raise ConfigError(f"memory={memory!r}; bytes, or a number with one of {list(UNITS)} are accepted, as '512MiB'")
    if not 0 < size <= _LARGEST:
        raise ConfigError(f"memory={memory!r}; from 1 to {_LARGEST} bytes are accepted")
    return size


def slots_in(memory: Any, nbytes: Callable[[int], int], least: int) -> int:
    """The most slots that fit into `memory`.

    Parameters
    ----------
    memory : int or str
        As in `bytes_of`.
    nbytes : callable
        Bytes that so many slots take, growing with their number.
    least : int
        The fewest slots that are of use: the sinks and 4.

    Raises
    ------
    ConfigError
        The memory is not one, or too small for `least` slots; the line names how much those take.
    """
    size = bytes_of(memory)
    if nbytes(least) > size:
        raise ConfigError(
            f"memory={memory!r} is too small: the least, {least} tokens in every layer, takes {nbytes(least)} bytes"
        )
    low, high = least, 2 * least
    while nbytes(high) <= size:
        if high > _LARGEST:  # slots that take nothing
            return low
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if nbytes(middle) <= size else (low, middle)
    return low


def _number(value: Any) -> int | None:
    """An integer, also as a text of digits; None where it is none. A bool is none."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"\s*\d{1,20}\s*", value) else None
    try:
        return operator.index(value)
    except TypeError:
        return None
