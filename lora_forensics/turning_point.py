"""CS-Fluctuation and its valleys on plain arrays: numpy and scipy only, no files, no torch.

Source: Luo et al., "Towards Personalized AI: Early-stopping Low-Rank Adaptation of Foundation Models",
Eq. 2-4 and Algorithm 1. T checkpoints and a window of M checkpoints give `T - 3M + 2` values; value j is computed
from checkpoints j .. j+3M-2 and belongs to checkpoint j.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray
from scipy.signal import argrelmin

from lora_forensics.errors import UsageError

Floats = NDArray[np.float64]

MINIMUM_CHECKPOINTS = 9
"""3M + 3 at the smallest window, M = 2."""


@dataclass(frozen=True, slots=True)
class Fluctuation:
    """All steps from CS to CS-Fluctuation, each of its own length (start-aligned)."""

    average: Floats
    """MA, Eq. 3: shape (T - M + 1,)."""
    slope: Floats
    """MA_t - MA_(t-1): shape (T - M,)."""
    slope_average: Floats
    """X, the moving average of the slopes: shape (T - 2M + 1,)."""
    value: Floats
    """CS-Fluctuation, Eq. 4: shape (T - 3M + 2,)."""


def fluctuation(cosine: ArrayLike, window: int, learning_rate: ArrayLike = 1.0) -> Fluctuation:
    """CS-Fluctuation with its intermediate series.

    Args:
        cosine: CS at T checkpoints, shape (T,).
        window: M, in checkpoints, at least 2.
        learning_rate: one rate, or one per checkpoint; value j is divided by rate j. A rate <= 0 gives NaN.

    Raises:
        UsageError: a window below 2 (the variance of one value is 0), or rates of another length than T.
    """
    series = np.asarray(cosine, dtype=np.float64)
    if series.ndim != 1:
        raise UsageError(f"the cosine series has {series.ndim} dimensions, expected one number per checkpoint")
    if window < 2:
        raise UsageError(f"a window of {window} checkpoint is too small: the variance of one value is always 0")
    rates = np.asarray(learning_rate, dtype=np.float64)
    if rates.ndim and rates.shape != series.shape:
        raise UsageError(f"{rates.size} learning rates for {series.size} checkpoints")
    average = _windows(series, window).mean(axis=-1)
    slope = np.diff(average)
    slope_average = _windows(slope, window).mean(axis=-1)
    variance = _windows(slope_average, window).var(axis=-1)
    rates = np.broadcast_to(rates, series.shape)[: variance.size]
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
    reported = official(cs_fluctuation(cosine, window))
    return None if reported is None else (reported + 3 * window - 2, reported)


def algorithm1(series: Floats) -> int | None:
    """The paper's Algorithm 1: the bottom of the second valley, or None."""
    found = valleys(series)
    return int(found[1]) if found.size > 1 else None


def official(series: Floats) -> int | None:
    """What the released code reports: one sample after the bottom of a valley; see `official_stop`."""
    found = valleys(series)
    changes = np.diff(series)
    wanted = 0 if changes.size and changes[0] > 0 else 1
    return int(found[wanted]) + 1 if found.size > wanted else None


@dataclass(frozen=True, slots=True)
class Detector:
    """A rule that names the turning point."""

    find: Callable[[Floats], int | None]
    """CS-Fluctuation to the index of the turning point, or None."""
    divides: bool = True
    """Whether its CS-Fluctuation is divided by the learning rate, as in Eq. 4."""


DETECTORS: dict[str, Detector] = {
    "algorithm1": Detector(algorithm1),
    "official": Detector(official, divides=False),
}
"""Every detector by its name in `--detector`: first line = default."""


def _windows(series: Floats, window: int) -> Floats:
    """Full windows only: shape (n - window + 1, window), or (0, window) for a shorter series."""
    if series.size < window:
        return np.empty((0, window))
    return sliding_window_view(series, window)
