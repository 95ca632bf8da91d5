"""Detectors: rules that name the turning point of a run and the checkpoint to keep. One line in `DETECTORS` each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lora_forensics.turning_point import Floats, Fluctuation, fluctuation, noise_level, official_index, rising, valleys

NOISE_FACTOR = 4.0
"""By how many standard deviations of noise a valley's sides must rise: noise alone hardly does (test_detectors.py)."""

SCALES = (2, 3, 4, 6, 8, 12, 16, 24)
"""Windows that `multiscale` and the window sweep go through."""


@dataclass(frozen=True)
class Curve:
    """CS at T checkpoints, and how to look at it."""

    cosine: Floats
    """(T,)"""
    window: int
    """M, in checkpoints."""
    rates: Floats | float = 1.0
    """Learning rates to divide by: (T,) or one."""
    noise: float = 0.0
    """Standard deviation of one value of CS from rounding and storage."""

    @cached_property
    def fluctuation(self) -> Fluctuation:
        """CS-Fluctuation with its intermediate series."""
        return fluctuation(self.cosine, self.window, self.rates)

    @cached_property
    def valleys(self) -> NDArray[np.int64]:
        """Valleys of CS-Fluctuation that stand above the noise."""
        value = self.fluctuation.value
        if not self.noise or value.size < 3:
            return valleys(value)
        # on the root of CS-Fluctuation, where noise moves high and low values alike
        rates = np.broadcast_to(self.rates, self.cosine.shape)[: value.size]
        variance = noise_level(self.window) * self.noise**2
        deviation = np.sqrt(np.divide(variance, rates, out=np.zeros(value.shape), where=rates > 0))
        return rising(np.sqrt(value), valleys(value), NOISE_FACTOR * deviation)

    def located(self, index: int) -> Located:
        """A turning point at an index of CS-Fluctuation, with the last checkpoint that it is computed from."""
        return Located(index, index + 3 * self.window - 2)


@dataclass(frozen=True, slots=True)
class Located:
    """Where a detector sees the turning point, in checkpoints."""

    index: int
    support_end: int
    """Last checkpoint that this rests on."""


@dataclass(frozen=True, slots=True)
class Detector:
    """A rule: where the turning point is, and, if it keeps another checkpoint than that, which."""

    turning_point: Callable[[Curve], Located | None]
    keeper: Callable[[Floats], int | None] | None = None
    """From the movement before each checkpoint, (T,), to the index of the one to keep; None keeps the turning point."""

    def __call__(self, curve: Curve) -> Located | None:
        """Where the turning point is."""
        return self.turning_point(curve)


def algorithm1(curve: Curve) -> Located | None:
    """The paper's Algorithm 1: the bottom of the second valley."""
    return curve.located(int(curve.valleys[1])) if curve.valleys.size > 1 else None


def official(curve: Curve) -> Located | None:
    """What the released code reports: one sample after the bottom of a valley, without the learning rate."""
    undivided = replace(curve, rates=1.0)
    index = official_index(undivided.fluctuation.value, undivided.valleys)
    return None if index is None else curve.located(index)


def multiscale(curve: Curve) -> Located | None:
    """The median of the second valleys over windows of 2 to 24 checkpoints that fit 0.6 T."""
    windows = [window for window in SCALES if 3 * window - 1 < 0.6 * curve.cosine.size]
    found = [at for window in windows if (at := algorithm1(replace(curve, window=window))) is not None]
    if not found:
        return None
    return Located(round(float(np.median([at.index for at in found]))), max(at.support_end for at in found))


def prominence(curve: Curve) -> Located | None:
    """The second valley whose sides both rise to twice its bottom (0.3 dex) or more."""
    value = curve.fluctuation.value
    with np.errstate(divide="ignore"):
        logarithm = np.log10(value)
    finite = logarithm[np.isfinite(logarithm)]
    if not finite.size:
        return None
    # an exact zero counts as ten times deeper than the lowest value above it
    found = rising(np.where(value == 0, finite.min() - 1, logarithm), curve.valleys, 0.3)
    return curve.located(int(found[1])) if found.size > 1 else None


def half_of_path(moved: Floats) -> int | None:
    """The first checkpoint at which half of the way that the weights moved is covered.

    Of the rules without a constant it has the best measured record, and it sees no overfitting (docs/validity.md).

    Args:
        moved: (T,) distance of all weights from the checkpoint before, at the first from the base; NaN is left out.
    """
    covered = np.nan_to_num(moved).cumsum()
    if 2 * np.isnan(moved).sum() >= moved.size or not 0 < covered[-1] < np.inf:
        return None
    return int(np.argmax(covered >= covered[-1] / 2))


DETECTORS: dict[str, Detector] = {
    "half_path": Detector(algorithm1, half_of_path),
    "algorithm1": Detector(algorithm1),
    "official": Detector(official),
    "multiscale": Detector(multiscale),
    "prominence": Detector(prominence),
}
"""Every detector by its name in `--detector`; the first is the default: it has the best record (docs/validity.md)."""

DEFAULT_DETECTOR = next(iter(DETECTORS))
