"""What one row holds, in host memory: to go on from it later, in any row."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from liquidfusion.exceptions import CacheError
from liquidfusion.geometry import Geometry
from liquidfusion.state import session


@dataclass(frozen=True, eq=False)
class RowState:
    """All that a row of slots knows; nothing changes it.

    `tokens`: the ids that the row has read, in order. `description`, `tensors`: as in `session.State`, of one row.
    """

    tokens: tuple[int, ...]
    description: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file that is whole or not there at all, and that only its owner may read."""
        session.write(session.State({**self.description, "tokens": list(self.tokens)}, dict(self.tensors)), path)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], geometry: Geometry) -> Self:
        """Read one that was written for a model like this.

        Raises
        ------
        CacheError
            It is truncated, was changed, or belongs to another model; or the file is no state of a row.
        """
        state = session.read(path, geometry)
        tokens = state.description.pop("tokens", None)
        seen = state.description["seen"]
        if not isinstance(tokens, list) or not all(isinstance(t, int) for t in tokens) or seen != [len(tokens)]:
            raise CacheError(f"{path} is a session of {len(seen)} rows and not the state of one row of an engine")
        return cls(tuple(tokens), state.description, state.tensors)
