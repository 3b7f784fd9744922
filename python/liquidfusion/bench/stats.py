"""Means with bootstrap intervals, and the one form in which every figure is reported."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure: its 95 % interval, and the same figure of the full cache where it was measured.

    Attributes
    ----------
    value
        The figure.
    unit
        What it counts: ``"tokens/s"``, ``"ms"``, ``"bytes"``, … or ``""``.
    low, high
        95 % bootstrap interval, or None.
    full
        The same figure measured with the full cache, or None.
    """

    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    full: float | None = None

    def as_dict(self) -> dict[str, object]:
        """Return the fields as they are stored in a result file."""
        return asdict(self)


def bootstrap(
    values: ArrayLike, *, weights: ArrayLike | None = None, rounds: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Return the (weighted) mean of `values` and its 95 % percentile-bootstrap interval.

    Parameters
    ----------
    values
        One number for each independent unit: a trial, an article, a block of text.
    weights
        How much each unit counts, or None for equally.

    Notes
    -----
    B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979).
    """
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    rows = np.random.default_rng(seed).integers(0, len(x), (rounds, len(x)))
    means = (x * w)[rows].sum(1) / w[rows].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float((x * w).sum() / w.sum()), float(low), float(high)


def mean_metric(values: Sequence[float], unit: str = "", full: Sequence[float] | None = None) -> Metric:
    """Return the mean of `values` with its interval, beside the mean of the full cache's values."""
    value, low, high = bootstrap(values)
    return Metric(value, unit, low, high, None if full is None else float(np.mean(full)))
