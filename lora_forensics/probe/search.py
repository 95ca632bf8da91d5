"""Which checkpoint to score next: the best so far is closed in from both sides, over the root of its place in the run.

Held-out loss falls fast and rises slowly, so early checkpoints lie closer together on that axis. Measured in
benchmarks/validity/probe.py; other axes, even grids and models of the curve were no better there.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise

_EARLY = 8
"""One of the first checkpoints to score lies at an eighth of the run, if no candidate lies in its first quarter."""


def first_places(count: int, candidates: Sequence[int], evaluations: int) -> list[int]:
    """Where to begin: the candidates, one that is early, and the last.

    Args:
        count: how many checkpoints there are.
        candidates: places of those that the verdict names, the most likely first.
        evaluations: how many may be scored; two are left to close in, if there are so many.
    """
    ends = [] if any(place < count // 4 for place in candidates) else [count // _EARLY]
    likely = list(candidates)[: max(1, evaluations - 2 - len(ends) - 1)] if candidates else [(count - 1) // 2]
    return list(dict.fromkeys([*likely, *ends, count - 1]))[:evaluations]


def next_places(losses: Mapping[int, float], closed: Collection[int], count: int, many: int = 1) -> list[int]:
    """Up to `many` places to score next, none where both neighbours of the best are closed.

    The wider side between the best and its neighbours in `losses` is halved; several places halve what that leaves.

    Args:
        losses: place to loss; lower is better, of equals the earlier.
        closed: places that are not to be scored: scored before, or failed.
        count: how many checkpoints there are.
        many: how many are scored at once.
    """
    if losses:
        best = min(losses, key=lambda place: (losses[place], place))
        low = max((place for place in losses if place < best), default=-1)
        high = min((place for place in losses if place > best), default=count)
        sides = [(low, best), (best, high)]
    else:
        edges = [-1, *sorted(closed), count]
        sides = list(pairwise(edges))
    found: list[int] = []
    waiting = [(-_width(*side), side) for side in sides]
    heapq.heapify(waiting)
    while waiting and len(found) < many:
        _, (low, high) = heapq.heappop(waiting)
        free = [place for place in range(low + 1, high) if place not in closed]
        if free:
            middle = (_axis(low) + _axis(high)) / 2
            place = min(free, key=lambda at: abs(_axis(at) - middle))
            found.append(place)
            for side in ((low, place), (place, high)):
                heapq.heappush(waiting, (-_width(*side), side))
    return found


class Search:
    """Gives places to score and takes their losses; the same losses lead to the same places."""

    def __init__(self, count: int, candidates: Sequence[int], evaluations: int, many: int = 1) -> None:
        """As `first_places` and `next_places`."""
        self._count = count
        self._first = first_places(count, candidates, evaluations)
        self._evaluations = evaluations
        self._many = many
        self.losses: dict[int, float] = {}
        self._tried: set[int] = set()

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of places; each is to be followed by `tell`."""
        while len(self._tried) < self._evaluations:
            left = [place for place in self._first if place not in self._tried]
            room = min(self._many, self._evaluations - len(self._tried))
            places = left[:room] or next_places(self.losses, self._tried, self._count, room)
            if not places:
                return
            yield places
            self._tried |= set(places)

    def tell(self, place: int, loss: float | None) -> None:
        """The loss at a place; None where it has none."""
        self._tried.add(place)
        if loss is not None and math.isfinite(loss):
            self.losses[place] = loss


def _axis(place: int) -> float:
    return math.sqrt(place + 1)


def _width(low: int, high: int) -> float:
    return _axis(high) - _axis(low)
