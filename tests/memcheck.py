"""Exercise the bindings on arrays of numpy, for a run under valgrind's memcheck (``make memcheck``).

The extension is loaded without its package, which would load torch; wrong reads and writes show as errors of valgrind.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("_core", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Numbers:
    """Numbers from 0 to 1. Those of numpy are seeded by the system, whose bytes valgrind takes for uninitialised."""

    def __init__(self) -> None:
        self.drawn = 0

    def random(self, shape: tuple[int, ...]) -> np.ndarray:
        count = int(np.prod(shape))
        self.drawn += count
        return (
            np.modf(np.arange(self.drawn - count, self.drawn) * 0.6180339887498949)[0].astype(np.float32).reshape(shape)
        )


def accumulations(core: Any, rng: Numbers) -> None:
    for shape in [(1, 1, 1, 1, 1), (2, 3, 2, 5, 33), (1, 2, 4, 3, 2500), (1, 8, 4, 8, 4097)]:
        batch, heads, _, queries, columns = shape
        ages = np.tile(np.arange(queries - 1, -1, -1, dtype=np.int32), (batch, 1))
        probabilities = rng.random(shape)
        mass, peak = np.zeros((2, batch, heads, columns), dtype=np.float32)
        core.accumulate(probabilities, ages, [queries] * batch, mass, peak, 1.0, 1.0, threads=2)
        mean = probabilities.mean(2)
        assert np.allclose(mass, mean.sum(2), rtol=1e-4)
        assert np.allclose(peak, mean.max(2), rtol=1e-4)


def ledgers(core: Any, rng: Numbers) -> None:
    for strategy in ("streaming", "h2o", "liquid_fusion", "keydiff"):
        for slots, interval in [(40, 3), (264, 16)]:
            shape = (2, 2, 3, slots)
            positions = np.full(shape, -1, dtype=np.int32)
            mass, peak = np.zeros((2, *shape), dtype=np.float32)
            spec = core.Spec(strategy, slots, eviction_interval=interval)
            ledger = core.Ledger(spec, positions, mass, peak, threads=2)
            chosen = np.empty(shape[:3], dtype=np.int64)
            new = 3 * slots + 5
            ledger.begin([new, new - 4], chosen)
            columns = np.tile(np.arange(new, dtype=np.int32), (2, 1))
            columns[1] = np.maximum(columns[1] - 4, -1)
            source = np.empty(shape[1:], dtype=np.int32)
            for layer in range(2):
                scores = rng.random((2, 2, 3, slots + new))
                distinct = rng.random((2, 3, slots + new))
                ledger.chunk(layer, columns, scores[0].copy(), scores[1].copy(), source, distinct)
                assert (np.sort(source) >= 0).all()
            ledger.finish(rng.random(shape))
            for _ in range(4 * interval):
                ledger.begin([1, 1], chosen)
                mass += rng.random(shape)
                peak += rng.random(shape)
                ledger.finish(rng.random(shape))
            for row in positions.reshape(-1, slots):
                assert len(set(row.tolist())) == slots


if __name__ == "__main__":
    extension = load(Path(sys.argv[1]))
    generator = Numbers()
    accumulations(extension, generator)
    ledgers(extension, generator)
    print("memcheck: every check passed")
