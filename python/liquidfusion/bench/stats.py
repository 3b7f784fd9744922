"""Means with bootstrap intervals, and the one form in which every figure is reported."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ROUNDS = 2000


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure: its 95 % interval, and the same figure of the full cache where it was measured.

    Attributes
    ----------
    value
        The figure; not finite where a model computes what is no number.
    unit
        What it counts: ``"tokens/s"``, ``"ms"``, ``"bytes"``, … or ``""``.
    low, high
        95 % bootstrap interval, or None: one sample tells nothing of its spread.
    full
        The same figure measured with the full cache, or None.
    n
        Samples of the interval: trials, articles, blocks of text; None: the figure is no mean of samples.
    """

    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    full: float | None = None
    n: int | None = None

    def as_dict(self) -> dict[str, object]:
        """Return the fields as they are stored in a result file."""
        return asdict(self)


def bootstrap(
    values: ArrayLike, *, weights: ArrayLike | None = None, rounds: int = _ROUNDS, seed: int = 0
) -> tuple[float, float, float]:
    """Return the (weighted) mean of `values` and its 95 % percentile-bootstrap interval.

    Parameters
    ----------
    values
        One number for each independent unit: a trial, an article, a block of text.
    weights
        How much each unit counts, or None for equally.

    Returns
    -------
    tuple
        Mean, low, high; the latter two are NaN for a single value, which tells nothing of its spread.

    Notes
    -----
    B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979).
    """
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    with np.errstate(invalid="ignore"):  # infinite losses are figures, too
        mean = float((x * w).sum() / w.sum())
        if len(x) < 2:
            return mean, math.nan, math.nan
        low, high = np.quantile(_resampled(x, w, rounds, seed), (0.025, 0.975))
    return mean, float(low), float(high)


def _resampled(x: NDArray[np.float64], w: NDArray[np.float64], rounds: int, seed: int) -> NDArray[np.float64]:
    rows = np.random.default_rng(seed).integers(0, len(x), (rounds, len(x)))
    means: NDArray[np.float64] = (x * w)[rows].sum(1) / w[rows].sum(1)
    return means


def difference(
    one: ArrayLike, other: ArrayLike, *, weights: tuple[ArrayLike, ArrayLike] | None = None, paired: bool
) -> tuple[float, float, float]:
    """Return the mean of `other` less that of `one`, and its 95 % percentile-bootstrap interval.

    Parameters
    ----------
    weights
        How much each unit counts, for both; None: equally. With `paired` those of `one` count.
    paired
        Whether the units are the same ones, in the same order: then they are drawn together, and what they have in
        common cancels.
    """
    x, y = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    w, v = (np.ones_like(x), np.ones_like(y)) if weights is None else map(np.asarray, weights)
    if paired:
        return bootstrap(y - x, weights=w)
    with np.errstate(invalid="ignore"):
        mean = float(np.average(y, weights=v) - np.average(x, weights=w))
        if min(len(x), len(y)) < 2:
            return mean, math.nan, math.nan
        drawn = _resampled(y, v.astype(float), _ROUNDS, 1) - _resampled(x, w.astype(float), _ROUNDS, 0)
        low, high = np.quantile(drawn, (0.025, 0.975))
    return mean, float(low), float(high)


def interval(low: float, high: float) -> tuple[float | None, float | None]:
    """Return the ends of an interval as a `Metric` has them: None for one that is not there."""
    return (None, None) if math.isnan(low) or math.isnan(high) else (low, high)


def exp(value: float) -> float:
    """Return e to the power of `value`; infinity where that is too large for a float."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def mean_metric(values: Sequence[float], unit: str = "", full: Sequence[float] | None = None) -> Metric:
    """Return the mean of `values` with its interval, beside the mean of the full cache's values."""
    value, low, high = bootstrap(values)
    of_full = None if full is None else float(np.mean(full))
    return Metric(value, unit, *interval(low, high), full=of_full, n=len(values))


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of repeats of one measurement and their standard deviation, None for a single one."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
