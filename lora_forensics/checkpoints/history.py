"""What a trainer logged, on the axis of optimizer steps: learning rates, losses, epochs."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lora_forensics.values import as_count, as_number

_ABSURD = 1e30
"""No rate and no loss is that large; numbers near the end of the range overflow whatever is done with them."""
ADAPTIVE = re.compile(r"prodigy|dadapt|adafactor|automagic|schedulefree", re.IGNORECASE)
"""Optimizers whose real rate is not the one that was asked for."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Values known at some steps; steps strictly increasing, values finite."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    @classmethod
    def of(cls, points: Iterable[tuple[object, object]]) -> Curve:
        """A curve from logged pairs; what is no finite number is left out, the last value of a step counts."""
        known: dict[int, float] = {}
        for step, value in points:
            at, number = as_count(step), as_number(value)
            if at is not None and number is not None and abs(number) < _ABSURD:
                known[at] = number
        steps = tuple(sorted(known))
        return cls(steps, tuple(known[step] for step in steps))

    def covers(self, step: int) -> bool:
        """Whether this log tells of a step: it may begin and end one interval away from it."""
        if not self.steps:
            return False
        interval = max((two - one for one, two in pairwise(self.steps)), default=self.steps[0])
        return self.steps[0] - interval <= step <= self.steps[-1] + interval

    def moved(self, by: int = 0, per: int = 1) -> Curve:
        """The same values at (step + by) // per: of a log that counts from 0, or that counts micro-batches."""
        return Curve.of(((step + by) // per, value) for step, value in zip(self.steps, self.values, strict=True))

    def times(self, factor: float | Curve) -> Curve:
        """Each value multiplied by a number, or by the value that another curve has there."""
        other = (factor.between(step) if isinstance(factor, Curve) else factor for step in self.steps)
        pairs = zip(self.steps, self.values, other, strict=True)
        return Curve.of((step, value * share) for step, value, share in pairs if share is not None)

    def at(self, step: int) -> float | None:
        """The value logged at exactly this step."""
        index = bisect_right(self.steps, step) - 1
        return self.values[index] if index >= 0 and self.steps[index] == step else None

    def last(self, step: int) -> float | None:
        """The value logged last, at or before this step."""
        index = bisect_right(self.steps, step) - 1
        return self.values[index] if index >= 0 else None

    def between(self, step: int) -> float | None:
        """Interpolated linearly between logged steps, and constant beyond the first and the last."""
        if not self.steps:
            return None
        right = bisect_right(self.steps, step)
        if right in (0, len(self.steps)):
            return self.values[0 if right == 0 else -1]
        low, high = self.steps[right - 1], self.steps[right]
        share = (step - low) / (high - low)
        return self.values[right - 1] * (1 - share) + self.values[right] * share

    def sums(self, steps: Sequence[int]) -> list[float | None]:
        """Sums of the (interpolated) values of steps 1 .. s for every s of `steps`, which ascend."""
        if not self.steps:
            return [None] * len(steps)
        corners = sorted({1, *(s for s in (*self.steps, *steps) if s > 1)})
        values = [self.between(corner) or 0.0 for corner in corners]
        total, at = values[0], {1: values[0]}
        for (low, high), (first, last) in zip(pairwise(corners), pairwise(values), strict=True):
            total += (first + last) / 2 * (high - low) + (last - first) / 2  # of low + 1 .. high, linear between
            at[high] = total
        return [at.get(step, 0.0) for step in steps]


def schedule(name: str, rate: float, warmup: float, steps: int) -> Curve:
    """A learning-rate schedule by its name in transformers and diffusers; empty if its name does not tell all.

    Args:
        name: constant, constant_with_warmup, linear or cosine.
        rate: the peak rate.
        warmup: warm-up steps; below 1 a share of all steps, as kohya has it.
        steps: all optimizer steps of the training.
    """
    ramp = int(warmup * steps) if 0 < warmup < 1 else int(warmup)
    length = max(1, steps - ramp)
    decays: dict[str, Callable[[float], float]] = {
        "constant": lambda _: 1.0,
        "constant_with_warmup": lambda _: 1.0,
        "linear": lambda share: max(0.0, 1.0 - share),
        "cosine": lambda share: max(0.0, 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))),
    }
    if name not in decays or steps < 1:
        return Curve()
    if name == "constant":
        ramp, length = 0, steps
    every = max(1, steps // 2000)  # dense enough for a cosine: an error below 1e-6 of the peak
    points = sorted({0, ramp, steps, *range(0, steps + 1, every)})
    decay = decays[name]
    return Curve.of((s, rate * (s / ramp if s < ramp else decay((s - ramp) / length))) for s in points)
