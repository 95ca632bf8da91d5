"""CS-Fluctuation and its valleys on plain arrays: numpy and scipy only, no files, no torch.

Source: Luo et al., "Towards Personalized AI: Early-stopping Low-Rank Adaptation of Foundation Models",
Eq. 2-4 and Algorithm 1. T checkpoints and a window of M checkpoints give `T - 3M + 2` values; value j is computed
from checkpoints j .. j+3M-2 and belongs to checkpoint j.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray

from lora_forensics.errors import UsageError

Floats = NDArray[np.float64]

MINIMUM_CHECKPOINTS = 9
"""3M + 3 at the smallest window, M = 2."""


@dataclass(frozen=True, slots=True)
class Fluctuation:
    """All steps from CS to CS-Fluctuation, each of its own length on the last axis (start-aligned)."""

    average: Floats
    """MA, Eq. 3: shape (..., T - M + 1)."""
    slope: Floats
    """MA_t - MA_(t-1): shape (..., T - M)."""
    slope_average: Floats
    """X, the moving average of the slopes: shape (..., T - 2M + 1)."""
    value: Floats
    """CS-Fluctuation, Eq. 4: shape (..., T - 3M + 2)."""


def fluctuation(cosine: ArrayLike, window: int, learning_rate: ArrayLike = 1.0) -> Fluctuation:
    """CS-Fluctuation with its intermediate series.

    Args:
        cosine: CS at T checkpoints, shape (..., T): leading axes are a batch of series.
        window: M, in checkpoints, at least 2.
        learning_rate: one rate, or one per checkpoint; value j is divided by rate j. A rate <= 0 gives NaN.

    Raises:
        UsageError: a window below 2 (the variance of one value is 0), or rates of another length than T.
    """
    series = np.asarray(cosine, dtype=np.float64)
    if series.ndim == 0:
        raise UsageError("the cosine series is a single number, expected one per checkpoint")
    if window < 2:
        raise UsageError(f"a window of {window} checkpoint is too small: the variance of one value is always 0")
    rates = np.asarray(learning_rate, dtype=np.float64)
    if rates.ndim and rates.shape != series.shape[-1:]:
        raise UsageError(f"{rates.size} learning rates for {series.shape[-1]} checkpoints")
    average = _windows(series, window).mean(axis=-1)
    slope = np.diff(average)
    slope_average = _windows(slope, window).mean(axis=-1)
    variance = _windows(slope_average, window).var(axis=-1)
    rates = np.broadcast_to(rates, series.shape[-1:])[: variance.shape[-1]]
    value = np.divide(variance, rates, out=np.full(variance.shape, np.nan), where=rates > 0)
    return Fluctuation(average, slope, slope_average, value)


def cs_fluctuation(cosine: ArrayLike, window: int, learning_rate: ArrayLike = 1.0) -> Floats:
    """CS-Fluctuation (Eq. 4): shape (T - 3M + 2,), empty if T < 3M - 1. Arguments as in `fluctuation`."""
    return fluctuation(cosine, window, learning_rate).value


def valleys(series: ArrayLike) -> NDArray[np.int64]:
    """Indices of the bottoms of a series, ascending.

    A valley is counted where the difference turns from negative to positive; differences of exactly 0 are skipped, so
    that a flat bottom is one valley (its last sample). Never across NaN.
    """
    from scipy.signal import argrelmin  # takes longer than a rescan with nothing new

    values = np.asarray(series, dtype=np.float64)
    last_of_equals = np.flatnonzero(np.append(np.diff(values) != 0, True))  # NaN differs from everything
    if last_of_equals.size < 3:
        return np.empty(0, dtype=np.int64)
    bottoms: NDArray[np.int64] = last_of_equals[argrelmin(values[last_of_equals])[0]]
    return bottoms


def official_stop(cosine: ArrayLike, window: int) -> tuple[int, int] | None:
    """What the paper's released code would answer: `(detected_at, reported)`, 0-based checkpoints, or None.

    Its loop keeps the previous difference from one call to the next, so that a series that starts rising counts one
    valley too many: it stops at the first valley then, else at the second. It reports the sample after the bottom,
    once that sample's window is complete (`detected_at = reported + 3M - 2`), and leaves out the learning rate.
    """
    series = cs_fluctuation(cosine, window)
    reported = official_index(series, valleys(series))
    return None if reported is None else (reported + 3 * window - 2, reported)


def official_index(series: Floats, bottoms: NDArray[np.int64]) -> int | None:
    """The sample that the released code reports, given CS-Fluctuation and its valleys; see `official_stop`."""
    starts_rising = series.size > 1 and series[1] > series[0]
    wanted = 0 if starts_rising else 1
    return int(bottoms[wanted]) + 1 if bottoms.size > wanted else None


def noise_level(window: int) -> float:
    """What CS-Fluctuation is on average (rate 1) where CS is nothing but independent noise of variance 1.

    X is a filter of 2M samples, -1/M^2 on the first M and +1/M^2 on the others; the mean of the population variance
    over M neighbouring values follows from its autocovariance.
    """
    response = np.repeat([-1.0, 1.0], window) / window**2
    covariance = np.correlate(response, response, "full")[2 * window - 1 :][:window]
    weights = np.where(np.arange(window) == 0, 1.0, 2.0) * (window - np.arange(window)) / window**2
    return float(covariance[0] - weights @ covariance)


def rising(series: Floats, bottoms: NDArray[np.int64], floor: ArrayLike) -> NDArray[np.int64]:
    """Those of the valleys whose sides both rise above the bottom by more than `floor` (one value, or one each sample).

    A side reaches to the neighbouring valley of those that stay: shallow dips are dropped, shallowest first.
    """
    limits = np.broadcast_to(np.asarray(floor, dtype=np.float64), series.shape)
    kept: list[int] = []
    gaps = np.flatnonzero(np.isnan(series))
    for start, stop in zip([0, *(gaps + 1)], [*gaps, series.size], strict=True):
        here = bottoms[(bottoms >= start) & (bottoms < stop)]
        if here.size:
            kept.extend(_rising(series[start:stop], here - start, limits[start:stop]) + start)
    return np.array(kept, dtype=np.int64)


def _rising(series: Floats, bottoms: NDArray[np.int64], limits: Floats) -> NDArray[np.int64]:
    """`rising` in a stretch without gaps: a valley that goes leaves the higher of its sides to its neighbours."""
    peaks = np.maximum.reduceat(series, [0, *bottoms])
    peaks[-1] = max(peaks[-1], series[-1])
    while bottoms.size:
        excess = np.minimum(peaks[:-1], peaks[1:]) - series[bottoms] - limits[bottoms]
        shallowest = int(np.argmin(excess))
        if excess[shallowest] > 0:
            break
        peaks[shallowest] = max(peaks[shallowest], peaks[shallowest + 1])
        peaks, bottoms = np.delete(peaks, shallowest + 1), np.delete(bottoms, shallowest)
    return bottoms


def _windows(series: Floats, window: int) -> Floats:
    """Full windows of the last axis only: shape (..., n - window + 1, window), empty for a shorter series."""
    if series.shape[-1] < window:
        return np.empty((*series.shape[:-1], 0, window))
    return sliding_window_view(series, window, axis=-1)
