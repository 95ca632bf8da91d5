"""Every detector and every baseline that the study scores, in one table.

A candidate sees a `View`: what the checkpoints of a run hold and what a trainer logs, never the held-out loss. Rules
without a constant name a checkpoint from the view alone. Rules with one are of three kinds: a few values to choose
from; a threshold on a curve ("the first checkpoint where the curve reaches tau; the last one if it never does"), whose
values are quantiles of that curve over the training folds; boosted trees over many curves at once. Constants are
chosen on training folds only, by `score.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.signal import argrelmin, peak_prominences

from lora_forensics.similarity import choose_window
from lora_forensics.turning_point import cs_fluctuation, official_stop, valleys

Floats = NDArray[np.float64]
WINDOWS = (2, 3, 4, 6, 8, 12, 16, 24)


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """What a rule may look at: n checkpoints of one run."""

    steps: Floats
    columns: Mapping[str, Floats]
    """The tool's columns, mean over modules: (n,)."""
    cosines: Floats
    """CS of each module: (n, m)."""
    gram: Floats | None
    """Inner products of the joint changes: (n, n); None where only cosines were kept."""
    gram_up: Floats | None
    """The same of B, per output row."""
    rate: Floats
    dose: Floats
    """Sum of learning rates up to each checkpoint."""
    train: Floats
    """Mean training loss since the checkpoint before."""
    setting: Mapping[str, Any]
    """rank, alpha, samples, batch."""
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of checkpoints."""
        return len(self.steps)


Pick = Callable[[View], int | None]
Curve = Callable[[View], Floats]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A rule, and what it needs."""

    name: str
    ideas: str
    """The family of ideas that it belongs to."""
    pick: Pick | None = None
    """A rule without a constant."""
    choose: Callable[[View, float], int | None] | None = None
    """A rule with one of the values of `grid`."""
    grid: tuple[float, ...] = ()
    curve: Curve | None = None
    """A threshold rule."""
    features: Curve | None = None
    """Many curves, (n, k), for boosted trees that are taught the regret of a checkpoint."""
    needs: str = "cosine"
    """cosine: CS alone; weights: the files; settings: hyper-parameters; log: the training loss."""

    @property
    def tuned(self) -> bool:
        """Whether a constant is chosen on training folds."""
        return self.pick is None


# --- CS-Fluctuation -------------------------------------------------------------------------------------------------


def cosine(view: View) -> Floats:
    """CS as the tool averages it."""
    return view.columns["cosine"]


def second_valley(series: Floats, window: int) -> int | None:
    """Algorithm 1 at a window."""
    if window < 2 or len(series) < 3 * window + 3:
        return None
    found = valleys(cs_fluctuation(series, window))
    return int(found[1]) if found.size > 1 else None


def auto_window(view: View) -> int | None:
    """The window that the tool chooses."""
    cadence = float(np.median(np.diff(view.steps))) if view.count > 1 else None
    per_epoch = max(1.0, view.setting["samples"] / view.setting["batch"])
    return choose_window("auto", view.count, cadence, per_epoch).size


def windows_of(count: int) -> list[int]:
    """Windows of the multi-scale rule."""
    return [window for window in WINDOWS if 3 * window - 1 < 0.6 * count and count >= 3 * window + 3]


def multiscale_picks(series: Floats) -> list[int]:
    """Second valleys over all windows that fit."""
    found = [second_valley(series, window) for window in windows_of(len(series))]
    return [place for place in found if place is not None]


def middle_of(picks: list[int]) -> int | None:
    """Median of picks, rounded down."""
    return int(np.median(picks)) if picks else None


def multiscale(series: Floats) -> int | None:
    """Median of the second valleys over windows."""
    return middle_of(multiscale_picks(series))


def latest(series: Floats) -> int | None:
    """Latest of the second valleys over windows."""
    return max(multiscale_picks(series), default=None)


def prominent_valley(series: Floats, window: int, dex: float) -> int | None:
    """The second valley of log10 CS-Fluctuation that is at least so many decades deep."""
    if window < 2 or len(series) < 3 * window + 3:
        return None
    logs = np.log10(np.maximum(cs_fluctuation(series, window), 1e-300))
    found = valleys(logs)
    deep = found[peak_prominences(-logs, found)[0] >= dex] if found.size else found
    return int(deep[1]) if len(deep) > 1 else None


def settles(curve: Floats, share: float) -> int | None:
    """First place after the maximum where a curve falls to a share of it."""
    top = int(np.nanargmax(curve)) if np.isfinite(curve).any() else 0
    below = np.flatnonzero(curve[top:] <= share * curve[top])
    return top + int(below[0]) if below.size else None


def knee(curve: Floats) -> int | None:
    """The place farthest from the straight line between both ends."""
    good = np.isfinite(curve)
    if good.sum() < 3 or curve[good][0] == curve[good][-1]:
        return None
    places = np.flatnonzero(good)
    values = curve[good]
    line = np.interp(places, [places[0], places[-1]], [values[0], values[-1]])
    return int(places[np.argmax(np.abs(values - line))])


def smooth(curve: Floats, width: int) -> Floats:
    """Centred moving average that keeps the length."""
    width = max(1, width)
    padded = np.pad(curve, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")


def fraction_window(view: View, parts: int) -> int:
    """T / parts, at least 2."""
    return max(2, round(view.count / parts))


def fluctuation_at(view: View, parts: int) -> Floats:
    """CS-Fluctuation at M = T / parts; empty where it does not fit."""
    return cs_fluctuation(cosine(view), fraction_window(view, parts))


def per_module(view: View, pick: Callable[[Floats], int | None]) -> int | None:
    """Median of a pick over modules."""
    found = [pick(view.cosines[:, place]) for place in range(view.cosines.shape[1])]
    return middle_of([place for place in found if place is not None])


def over(view: View, axis: Floats, pick: Callable[[Floats], int | None]) -> int | None:
    """Put CS on an even grid of another axis, pick there, and come back."""
    axis = np.maximum.accumulate(axis)
    grid = np.linspace(axis[0], axis[-1], view.count)
    place = pick(np.interp(grid, axis, cosine(view)))
    return None if place is None else min(int(np.searchsorted(axis, grid[place])), view.count - 1)


def decorrelation_window(series: Floats) -> int:
    """The lag at which the slopes of CS stop resembling themselves (autocorrelation below 1/e), at least 2."""
    slope = np.diff(series)
    slope = slope - slope.mean()
    total = float(slope @ slope) or 1.0
    for lag in range(1, len(slope) // 3):
        if float(slope[lag:] @ slope[:-lag]) / total < 1 / np.e:
            return max(2, lag)
    return max(2, len(slope) // 3)


def extremum_of_cosine(view: View) -> int | None:
    """First local extremum of smoothed CS."""
    slope = np.diff(smooth(cosine(view), fraction_window(view, 10)))
    turned = np.flatnonzero(np.sign(slope[1:]) != np.sign(slope[:-1]))
    return int(turned[0]) + 1 if turned.size else None


# --- movement -------------------------------------------------------------------------------------------------------


def squared(gram: Floats, left: NDArray[np.int64], right: NDArray[np.int64]) -> Floats:
    """Squared distances between checkpoints."""
    return np.maximum(gram[left, left] + gram[right, right] - 2 * gram[left, right], 0)


def norms(gram: Floats) -> Floats:
    """Distance from the start: (n,)."""
    return np.sqrt(np.maximum(np.diagonal(gram), 0))


def moves(gram: Floats) -> Floats:
    """Distance to the checkpoint before; the first counts from zero: (n,)."""
    places = np.arange(1, len(gram))
    return np.concatenate([norms(gram)[:1], np.sqrt(squared(gram, places, places - 1))])


def joint(view: View) -> Floats:
    """The joint Gram matrix."""
    assert view.gram is not None
    return view.gram


def up(view: View) -> Floats:
    """The Gram matrix of B."""
    assert view.gram_up is not None
    return view.gram_up


def rows_moved(view: View) -> Floats:
    """How far B has moved per output row (root mean square): the weights-only counterpart of dose * sqrt(rank)."""
    return norms(up(view))


def rows_path(view: View) -> Floats:
    """The same for the path instead of the displacement."""
    return np.cumsum(moves(up(view)))


def path(view: View) -> Floats:
    """Path length of the joint change."""
    return np.cumsum(moves(joint(view)))


def straightness(view: View) -> Floats:
    """Displacement over path."""
    return norms(joint(view)) / path(view)


def local_straightness(view: View) -> Floats:
    """The same over the last tenth of the checkpoints (a window, not the whole way)."""
    gram, width = joint(view), fraction_window(view, 10)
    places = np.arange(view.count)
    before = np.maximum(places - width, 0)
    length = path(view)
    span = length - length[before]
    return np.where(span > 0, np.sqrt(squared(gram, places, before)) / np.where(span > 0, span, 1), 1.0)


def persistence(view: View) -> Floats:
    """Cosine of each movement with the one before, smoothed over a tenth of the checkpoints."""
    gram, n = joint(view), view.count
    now, before, first = np.arange(2, n), np.arange(1, n - 1), np.arange(n - 2)
    inner = gram[now, before] - gram[now, first] - gram[before, before] + gram[before, first]
    length = moves(gram)
    values = inner / np.maximum(length[2:] * length[1:-1], 1e-300)
    return smooth(np.concatenate([values[:1], values[:1], values]), fraction_window(view, 10))


def radial(view: View) -> Floats:
    """Cosine of each movement with the change itself (1: only grows), smoothed."""
    gram, n = joint(view), view.count
    now, before = np.arange(1, n), np.arange(n - 1)
    inner = gram[now, before] - gram[before, before]
    values = inner / np.maximum(moves(gram)[1:] * norms(gram)[before], 1e-300)
    return smooth(np.concatenate([[1.0], values]), fraction_window(view, 10))


def growth(view: View) -> Floats:
    """Exponent of displacement against path, d log |D| / d log path, over a tenth: 1 straight, 1/2 a random walk."""
    size, length = np.log(norms(joint(view)) + 1e-300), np.log(path(view) + 1e-300)
    width = fraction_window(view, 10)
    places = np.arange(view.count)
    before = np.maximum(places - width, 0)
    gap = length - length[before]
    return np.where(gap > 0, (size - size[before]) / np.where(gap > 0, gap, 1), 1.0)


def rotations(view: View) -> Floats:
    """1 - cos between neighbouring changes, jointly; the first repeats the second."""
    gram, size = joint(view), norms(joint(view))
    now = np.arange(1, view.count)
    values = 1 - gram[now, now - 1] / np.maximum(size[1:] * size[:-1], 1e-300)
    return np.concatenate([values[:1], values])


def falls_to(curve: Floats, bound: float) -> int | None:
    """First place where a curve is at or below a bound."""
    below = np.flatnonzero(curve <= bound)
    return int(below[0]) if below.size else None


def corner(view: View) -> int | None:
    """The checkpoint farthest from the straight way between the first and the last."""
    gram = joint(view)
    last = view.count - 1
    places = np.arange(view.count)
    chord = squared(gram, np.array([last]), np.array([0]))[0]
    along = gram[places, last] - gram[places, 0] - gram[0, last] + gram[0, 0]
    away = squared(gram, places, np.zeros_like(places)) - along**2 / max(chord, 1e-300)
    return int(np.argmax(away))


def sharpest_turn(view: View) -> int | None:
    """Where the way so far and the way still to go differ most in direction."""
    gram, last = joint(view), view.count - 1
    places = np.arange(1, last)
    inner = gram[places, last] - np.diagonal(gram)[places]
    length = norms(gram)[places] * np.sqrt(squared(gram, places, np.full_like(places, last)))
    return int(places[np.argmin(inner / np.maximum(length, 1e-300))]) if places.size else None


def settled_modules(view: View, share: float) -> int | None:
    """First checkpoint by which this share of the modules has passed half of its cosine's whole change."""
    moved = np.abs(view.cosines - view.cosines[:1])
    halves = np.argmax(moved >= moved.max(axis=0, keepdims=True) / 2, axis=0)
    return int(np.quantile(halves, share, method="lower"))


def local_minimum(curve: Floats, width: int) -> int | None:
    """First local minimum of a smoothed curve that is not its edge."""
    found = argrelmin(smooth(curve, width))[0]
    return int(found[0]) if found.size else None


def magnitude_share(view: View) -> Floats:
    """Change of the rows' lengths against the change of their directions, both per entry of W's rows (logarithm)."""
    size = np.maximum(view.columns["magnitude_change"], 1e-300)
    return np.log(size / np.sqrt(np.maximum(view.columns["direction_change"], 1e-300)))


# --- training loss, hyper-parameters, nulls -----------------------------------------------------------------------


def learned(view: View) -> Floats:
    """Share of the training loss's fall that is done, smoothed over a twentieth."""
    curve = smooth(view.train, fraction_window(view, 20))
    fall = curve[0] - curve.min()
    return (curve[0] - curve) / fall if fall > 0 else np.zeros(view.count)


def by_log_steps(view: View, curve: Floats) -> int | None:
    """Knee against the logarithm of the steps."""
    grid = np.geomspace(view.steps[0], view.steps[-1], view.count)
    place = knee(np.interp(grid, view.steps, curve))
    return None if place is None else min(int(np.searchsorted(view.steps, grid[place])), view.count - 1)


@cache
def null_pick(count: int, window: int) -> int | None:
    """Median pick of a detector on 200 random walks: algorithm 1 at a window, or multi-scale for window 0."""
    walks = np.random.default_rng(22).normal(size=(200, count)).cumsum(axis=1)
    found = [multiscale(walk) if window == 0 else second_valley(walk, window) for walk in walks]
    return middle_of([place for place in found if place is not None])


@cache
def null_latest(count: int) -> int | None:
    """Median of the latest second valley over windows on 200 random walks."""
    walks = np.random.default_rng(22).normal(size=(200, count)).cumsum(axis=1)
    return middle_of([place for walk in walks if (place := latest(walk)) is not None])


@cache
def null_band(count: int) -> tuple[float, float]:
    """Central 95 % of the multi-scale pick on random walks."""
    walks = np.random.default_rng(23).normal(size=(200, count)).cumsum(axis=1)
    found = [place for walk in walks if (place := multiscale(walk)) is not None]
    return (float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))) if found else (0.0, 0.0)


def multiscale_outside_null(view: View) -> int | None:
    """Multi-scale where it lies outside its null band; otherwise nothing (the middle)."""
    place = multiscale(cosine(view))
    low, high = null_band(view.count)
    return place if place is not None and not low <= place <= high else None


def panel(view: View) -> int | None:
    """Median of four constant-free picks of different kinds."""
    found = [
        multiscale(cosine(view)),
        knee(straightness(view)),
        knee(norms(joint(view))),
        settled_modules(view, 0.5),
    ]
    return middle_of([place for place in found if place is not None])


def staged_path(gram: Floats, stages: int) -> Floats:
    """Path length at every checkpoint where only so many even stages are measured, so that noise adds little."""
    count = len(gram)
    stops = np.unique(np.round(np.linspace(0, count, min(stages, count) + 1)[1:]).astype(np.int64)) - 1
    size = norms(gram)[stops[:1]]
    length = np.cumsum(np.concatenate([size, np.sqrt(squared(gram, stops[1:], stops[:-1]))]))
    return np.interp(np.arange(count), np.concatenate([[-1], stops]), np.concatenate([[0], length]))


def halfway(view: View) -> int:
    """First checkpoint that is as far from the start as from the last."""
    gram = joint(view)
    return int(np.argmax(gram[:, -1] >= gram[-1, -1] / 2))


def half_of(curve: Floats) -> int:
    """First checkpoint where a growing curve has half of its last value."""
    return int(np.argmax(curve >= curve[-1] / 2))


def step_size_halves(view: View) -> int | None:
    """First checkpoint after the longest movement at which movements are half as long, smoothed over a twentieth."""
    return settles(smooth(moves(joint(view)), fraction_window(view, 20)), 0.5)


def halves_or_path(view: View) -> int:
    """The same; half of the path where movements never become half as long."""
    place = step_size_halves(view)
    return half_of(path(view)) if place is None else place


def later_panel(view: View) -> int | None:
    """Median of: movements halved (or half of the path), half of the path, latest valley over path."""
    found = [halves_or_path(view), half_of(path(view)), over(view, path(view), latest)]
    return middle_of([place for place in found if place is not None])


def per_dose(view: View) -> Floats:
    """Movement between checkpoints per learning rate spent, smoothed over a twentieth."""
    spent = np.diff(view.dose, prepend=0)
    return smooth(moves(joint(view)) / np.maximum(spent, 1e-300), fraction_window(view, 20))


def file_features(view: View) -> Floats:
    """Curves that need the files only, free of the run's length where possible."""
    rank = float(view.setting["rank"])
    length, movement = path(view), moves(joint(view))
    curves = (
        np.log(rows_moved(view) + 1e-12),
        np.log(view.columns["relative_norm"] + 1e-12),
        straightness(view),
        local_straightness(view),
        growth(view),
        persistence(view),
        radial(view),
        np.log(rotations(view) + 1e-12),
        movement / np.maximum.accumulate(movement),
        length / length[-1],
        view.columns["effective_rank"] / rank,
        view.columns["stable_rank"] / rank,
        cosine(view) - cosine(view)[0],
        magnitude_share(view),
        np.linspace(0, 1, view.count),
    )
    return np.stack(curves, axis=1)


def all_features(view: View) -> Floats:
    """The same, and what settings and the training loss tell."""
    samples = _samples(view)
    curves = (
        learned(view),
        view.train / view.train[0],
        np.log(view.dose * _rank(view) / samples),
        np.log(rows_moved(view) / samples + 1e-12),
        np.log(view.steps * view.setting["batch"] / samples),
        np.full(view.count, np.log(samples)),
        view.rate / view.rate.max(),
    )
    return np.concatenate([file_features(view), np.stack(curves, axis=1)], axis=1)


def _rank(view: View) -> float:
    return float(np.sqrt(view.setting["rank"]))


def _samples(view: View) -> float:
    return float(view.setting["samples"])


def _scale(view: View) -> float:
    return float(view.setting["alpha"] / view.setting["rank"])


def _cosine_rules() -> list[Candidate]:
    steps = (10.0, 20.0, 30.0, 50.0, 75.0, 100.0, 150.0, 200.0)
    shares = (0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5)
    row = "cosine_rowwise"
    return [
        Candidate("algorithm1, auto window", "paper", lambda v: second_valley(cosine(v), auto_window(v) or 0)),
        Candidate(
            "official code, auto window",
            "paper",
            lambda v: stop[1] if (w := auto_window(v)) and (stop := official_stop(cosine(v), w)) else None,
        ),
        Candidate("algorithm1, row-wise", "paper", lambda v: second_valley(v.columns[row], auto_window(v) or 0)),
        Candidate("algorithm1, M = T/10", "paper", lambda v: second_valley(cosine(v), fraction_window(v, 10))),
        Candidate("algorithm1, M = T/5", "paper", lambda v: second_valley(cosine(v), fraction_window(v, 5))),
        Candidate("algorithm1, M = T/15", "paper", lambda v: second_valley(cosine(v), fraction_window(v, 15))),
        Candidate(
            "algorithm1, M tuned (checkpoints)",
            "paper",
            choose=lambda v, c: second_valley(cosine(v), int(c)),
            grid=tuple(float(w) for w in (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24)),
        ),
        Candidate(
            "algorithm1, M tuned (steps)",
            "paper",
            choose=lambda v, c: second_valley(cosine(v), max(2, round(c / float(np.median(np.diff(v.steps)))))),
            grid=steps,
        ),
        Candidate("multi-scale", "windows", lambda v: multiscale(cosine(v))),
        Candidate("multi-scale, earliest", "windows", lambda v: min(multiscale_picks(cosine(v)), default=None)),
        Candidate("multi-scale, latest", "windows", lambda v: latest(cosine(v))),
        Candidate("multi-scale, row-wise", "windows", lambda v: multiscale(v.columns[row])),
        Candidate("multi-scale outside its null band", "windows", multiscale_outside_null),
        Candidate(
            "window by decorrelation",
            "windows",
            lambda v: second_valley(cosine(v), decorrelation_window(cosine(v))),
        ),
        Candidate(
            "prominence 0.3 dex, M = T/15",
            "prominence",
            lambda v: prominent_valley(cosine(v), fraction_window(v, 15), 0.3),
        ),
        Candidate(
            "prominence, depth tuned",
            "prominence",
            choose=lambda v, c: prominent_valley(cosine(v), fraction_window(v, 15), c),
            grid=(0.05, 0.1, 0.2, 0.3, 0.5, 0.8),
        ),
        Candidate(
            "median of modules, M = T/10",
            "joint evidence",
            lambda v: per_module(v, lambda s: second_valley(s, fraction_window(v, 10))),
        ),
        Candidate(
            "median of modules, M = T/15",
            "joint evidence",
            lambda v: per_module(v, lambda s: second_valley(s, fraction_window(v, 15))),
        ),
        Candidate("median of modules, multi-scale", "joint evidence", lambda v: per_module(v, multiscale)),
        Candidate("half of the modules half-way", "order of settling", lambda v: settled_modules(v, 0.5)),
        Candidate("nine tenths of the modules half-way", "order of settling", lambda v: settled_modules(v, 0.9)),
        Candidate("first tenth of the modules half-way", "order of settling", lambda v: settled_modules(v, 0.1)),
        Candidate(
            "CS-Fluctuation settles",
            "settling",
            choose=lambda v, c: settles(f, c) if (f := fluctuation_at(v, 20)).size else None,
            grid=shares,
        ),
        Candidate(
            "knee of log CS-Fluctuation",
            "settling",
            lambda v: knee(np.log(f + 1e-300)) if (f := fluctuation_at(v, 20)).size else None,
        ),
        Candidate("knee of CS", "settling", lambda v: knee(cosine(v))),
        Candidate("first extremum of CS", "settling", extremum_of_cosine),
        Candidate("multi-scale over dose", "other axes", lambda v: over(v, v.dose, multiscale), needs="settings"),
        Candidate(
            "algorithm1 over dose, M = T/10",
            "other axes",
            lambda v: over(v, v.dose, lambda s: second_valley(s, fraction_window(v, 10))),
            needs="settings",
        ),
        Candidate("multi-scale over path", "other axes", lambda v: over(v, path(v), multiscale), needs="weights"),
        Candidate(
            "algorithm1 over path, M = T/10",
            "other axes",
            lambda v: over(v, path(v), lambda s: second_valley(s, fraction_window(v, 10))),
            needs="weights",
        ),
        Candidate("multi-scale over log steps", "other axes", lambda v: over(v, np.log(v.steps), multiscale)),
    ]


def _movement_rules() -> list[Candidate]:
    shares = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7)
    return [
        Candidate(name, ideas, pick, needs="weights")
        for name, ideas, pick in (
            ("knee of straightness", "straightness", lambda v: knee(straightness(v))),
            ("lowest straightness", "straightness", lambda v: int(np.argmin(straightness(v)))),
            ("knee of local straightness", "straightness", lambda v: knee(local_straightness(v))),
            ("growth like a random walk", "straightness", lambda v: falls_to(growth(v), 0.5)),
            ("movements uncorrelated", "persistence", lambda v: falls_to(persistence(v), 0.0)),
            ("persistence halved", "persistence", lambda v: falls_to(persistence(v), persistence(v)[0] / 2)),
            ("knee of persistence", "persistence", lambda v: knee(persistence(v))),
            ("lowest persistence", "persistence", lambda v: int(np.argmin(persistence(v)))),
            ("knee of radial share", "radial", lambda v: knee(radial(v))),
            ("radial share is zero", "radial", lambda v: falls_to(radial(v), 0.0)),
            ("lowest radial share", "radial", lambda v: int(np.argmin(radial(v)))),
            ("knee of rotation", "rotation", lambda v: knee(np.log(rotations(v) + 1e-12))),
            ("longest movement", "step size", lambda v: int(np.argmax(moves(joint(v))))),
            ("knee of the norm", "norm", lambda v: knee(norms(joint(v)))),
            ("knee of the norm over log steps", "norm", lambda v: by_log_steps(v, norms(joint(v)))),
            ("knee of B's movement", "norm", lambda v: knee(rows_moved(v))),
            ("corner of the way", "way", corner),
            ("sharpest turn of the way", "way", sharpest_turn),
            ("knee of effective rank", "spectrum", lambda v: knee(v.columns["effective_rank"])),
            ("knee of stable rank", "spectrum", lambda v: knee(v.columns["stable_rank"])),
            ("lowest effective rank", "spectrum", lambda v: int(np.argmin(v.columns["effective_rank"]))),
            ("highest effective rank", "spectrum", lambda v: int(np.argmax(v.columns["effective_rank"]))),
            (
                "effective rank turns",
                "spectrum",
                lambda v: local_minimum(v.columns["effective_rank"], fraction_window(v, 10)),
            ),
            (
                "stable rank turns",
                "spectrum",
                lambda v: local_minimum(v.columns["stable_rank"], fraction_window(v, 10)),
            ),
            ("knee of magnitude against direction", "magnitude", lambda v: knee(magnitude_share(v))),
            ("magnitude against direction turns", "magnitude", lambda v: int(np.argmax(magnitude_share(v)))),
            ("median of four rules", "panel", panel),
            ("half of the path", "half-way", lambda v: half_of(path(v))),
            ("half of the path in ten stages", "half-way", lambda v: half_of(staged_path(joint(v), 10))),
            ("half of the path in five stages", "half-way", lambda v: half_of(staged_path(joint(v), 5))),
            ("half of B's path in ten stages", "half-way", lambda v: half_of(staged_path(up(v), 10))),
            ("half of the way to the last", "half-way", halfway),
            ("half of B's path", "half-way", lambda v: half_of(rows_path(v))),
            ("half of the norm", "half-way", lambda v: half_of(norms(joint(v)))),
            ("half of the squared norm", "half-way", lambda v: half_of(norms(joint(v)) ** 2)),
            ("step size halves", "step size", step_size_halves),
            ("step size halves, else half of the path", "step size", halves_or_path),
            ("median of three later rules", "panel", later_panel),
            (
                "algorithm1 over path, M = T/5",
                "other axes",
                lambda v: over(v, path(v), lambda s: second_valley(s, fraction_window(v, 5))),
            ),
            ("multi-scale, latest, over path", "other axes", lambda v: over(v, path(v), latest)),
        )
    ] + [
        Candidate(
            "rotation settles",
            "rotation",
            choose=lambda v, c: settles(rotations(v), c),
            grid=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
            needs="weights",
        ),
        Candidate(
            "movement per dose settles",
            "step size",
            choose=lambda v, c: settles(per_dose(v), c),
            grid=shares,
            needs="weights",
        ),
        Candidate("learned from the files", "learned", features=file_features, needs="weights"),
        Candidate("learned from files, settings and training loss", "learned", features=all_features, needs="weights"),
        Candidate(
            "step size settles",
            "step size",
            choose=lambda v, c: settles(smooth(moves(joint(v)), fraction_window(v, 20)), c),
            grid=shares,
            needs="weights",
        ),
        Candidate(
            "share of the whole path",
            "step size",
            choose=lambda v, c: int(np.argmax(path(v) >= c * path(v)[-1])),
            grid=(0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9),
            needs="weights",
        ),
    ]


def _thresholds() -> list[Candidate]:
    weights = [
        ("straightness falls to", "straightness", lambda v: -straightness(v)),
        ("local straightness falls to", "straightness", lambda v: -local_straightness(v)),
        ("growth exponent falls to", "straightness", lambda v: -growth(v)),
        ("persistence falls to", "persistence", lambda v: -persistence(v)),
        ("radial share falls to", "radial", lambda v: -radial(v)),
        ("B moved per row / samples", "threshold", lambda v: rows_moved(v) / _samples(v)),
        ("B moved per row", "threshold", rows_moved),
        ("B moved per row / sqrt(samples)", "threshold", lambda v: rows_moved(v) / _samples(v) ** 0.5),
        ("scale * B moved per row / samples", "threshold", lambda v: _scale(v) * rows_moved(v) / _samples(v)),
        ("B's path per row / samples", "threshold", lambda v: rows_path(v) / _samples(v)),
        ("B's path per row", "threshold", rows_path),
        ("norm", "threshold", lambda v: norms(joint(v))),
        ("norm / sqrt(rank)", "threshold", lambda v: norms(joint(v)) / _rank(v)),
        ("norm / samples", "threshold", lambda v: norms(joint(v)) / _samples(v)),
        ("norm / sqrt(samples)", "threshold", lambda v: norms(joint(v)) / _samples(v) ** 0.5),
        ("relative norm", "threshold", lambda v: v.columns["relative_norm"]),
        ("relative norm / samples", "threshold", lambda v: v.columns["relative_norm"] / _samples(v)),
        ("relative norm / sqrt(samples)", "threshold", lambda v: v.columns["relative_norm"] / _samples(v) ** 0.5),
        ("direction change", "threshold", lambda v: v.columns["direction_change"]),
        ("direction change / samples", "threshold", lambda v: v.columns["direction_change"] / _samples(v)),
        ("magnitude change", "threshold", lambda v: v.columns["magnitude_change"]),
        ("path", "threshold", path),
        ("path / samples", "threshold", lambda v: path(v) / _samples(v)),
    ]
    settings = [
        ("dose * sqrt(rank) / samples", "threshold", lambda v: v.dose * _rank(v) / _samples(v)),
        ("dose / samples", "threshold", lambda v: v.dose / _samples(v)),
        ("dose * sqrt(rank)", "threshold", lambda v: v.dose * _rank(v)),
        ("dose * sqrt(rank) / sqrt(samples)", "threshold", lambda v: v.dose * _rank(v) / _samples(v) ** 0.5),
        ("dose", "threshold", lambda v: v.dose),
        ("epochs", "threshold", lambda v: v.steps * v.setting["batch"] / _samples(v)),
        ("steps / samples", "threshold", lambda v: v.steps / _samples(v)),
    ]
    log = [
        ("share of the training loss's fall", "training loss", learned),
        ("training loss against its start", "training loss", lambda v: -v.train / v.train[0]),
    ]
    made = [(weights, "weights"), (settings, "settings"), (log, "log")]
    return [Candidate(name, ideas, curve=curve, needs=needs) for rules, needs in made for name, ideas, curve in rules]


def _baselines() -> list[Candidate]:
    return [
        Candidate("last", "baseline", lambda v: v.count - 1),
        Candidate("middle", "baseline", lambda v: (v.count - 1) // 2),
        Candidate("half of the dose", "half-way", lambda v: half_of(v.dose), needs="settings"),
        Candidate("a quarter", "baseline", lambda v: (v.count - 1) // 4),
        Candidate("random (expected)", "baseline", lambda _v: -1),
        Candidate(
            "fraction of T, tuned",
            "baseline",
            choose=lambda v, c: int(c * (v.count - 1)),
            grid=(0.02, 0.05, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0),
        ),
        Candidate("fixed step, tuned", "baseline", curve=lambda v: v.steps, needs="settings"),
        Candidate("c / learning rate, tuned", "baseline", curve=lambda v: v.steps * v.rate.max(), needs="settings"),
        Candidate(
            "random walk, auto window",
            "baseline",
            lambda v: null_pick(v.count, w) if (w := auto_window(v)) and v.count >= 3 * w + 3 else None,
        ),
        Candidate("random walk, M = T/10", "baseline", lambda v: null_pick(v.count, fraction_window(v, 10))),
        Candidate("random walk, M = T/15", "baseline", lambda v: null_pick(v.count, fraction_window(v, 15))),
        Candidate("random walk, multi-scale", "baseline", lambda v: null_pick(v.count, 0)),
        Candidate("random walk, multi-scale, latest", "baseline", lambda v: null_latest(v.count)),
        Candidate(
            "random walk over path, M = T/10",
            "baseline",
            lambda v: over(v, path(v), lambda s: null_pick(len(s), fraction_window(v, 10))),
            needs="weights",
        ),
        Candidate(
            "random walk over path, multi-scale, latest",
            "baseline",
            lambda v: over(v, path(v), lambda s: null_latest(len(s))),
            needs="weights",
        ),
        Candidate("knee of the training loss", "baseline", lambda v: knee(v.train), needs="log"),
        Candidate("lowest training loss", "baseline", lambda v: int(np.argmin(v.train)), needs="log"),
        Candidate(
            "knee of the training loss over log steps", "training loss", lambda v: by_log_steps(v, v.train), needs="log"
        ),
    ]


CANDIDATES: tuple[Candidate, ...] = (*_cosine_rules(), *_movement_rules(), *_thresholds(), *_baselines())
"""All of them; nothing is scored that does not stand here."""
