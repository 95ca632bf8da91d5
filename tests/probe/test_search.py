"""The search against brute force, on curves of every shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_forensics.probe.search import Search, first_places, next_places


def searched(losses: Sequence[float], candidates: Sequence[int], evaluations: int, many: int = 1) -> Search:
    """A search that was told what it asked for; NaN is a failure."""
    search = Search(len(losses), candidates, evaluations, many)
    for places in search:
        assert 0 < len(places) <= many
        for place in places:
            assert place not in search.losses
            search.tell(place, losses[place])
    return search


def best_of(search: Search) -> int:
    """Where the loss was lowest."""
    return min(search.losses, key=lambda place: (search.losses[place], place))


valleys = st.tuples(st.integers(1, 200), st.floats(0, 1), st.floats(0.2, 3), st.floats(0.2, 3))


@given(valleys, st.integers(1, 12), st.lists(st.integers(0, 199), max_size=4), st.integers(1, 4))
def test_every_place_is_asked_for_once_and_within_the_evaluations(
    valley: tuple[int, float, float, float], evaluations: int, candidates: list[int], many: int
) -> None:
    """Places exist, none comes twice, and no more are asked for than were allowed."""
    count, share, left, right = valley
    losses = [abs(x - share) ** (left if x < share else right) for x in np.linspace(0, 1, count)]
    chosen = [place for place in candidates if place < count]
    search = searched(losses, chosen, evaluations, many)
    assert set(search.losses) <= set(range(count))
    assert 0 < len(search.losses) <= min(evaluations, count)


@given(valleys)
def test_a_smooth_valley_is_closed_in(valley: tuple[int, float, float, float]) -> None:
    """With logarithmically many evaluations the answer is that of brute force."""
    count, share, left, right = valley
    losses = [abs(x - share) ** (left if x < share else right) for x in np.linspace(0, 1, count)]
    enough = 6 + 3 * math.ceil(math.log2(count + 1))
    assert losses[best_of(searched(losses, [count // 2], enough))] == min(losses)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60))
def test_where_nothing_is_left_the_best_has_both_its_neighbours(losses: list[float]) -> None:
    """Any curve: the search ends at a local minimum, if it may go on."""
    search = searched(losses, [], len(losses))
    best = best_of(search)
    for near in (best - 1, best + 1):
        assert near in search.losses or not 0 <= near < len(losses)


@pytest.mark.parametrize(
    ("curve", "most"),
    [
        (lambda x: (np.sqrt(x) - 0.3) ** 2, 0.02),
        (lambda x: (np.sqrt(x) - 0.8) ** 2, 0.02),
        (lambda x: -x, 0.0),
        (lambda x: x, 0.06),
        (lambda x: 0 * x, 0.0),
        (lambda x: np.exp(-12 * x) + 0.3 * x, 0.03),
    ],
)
def test_six_evaluations_are_near_the_best(curve: Callable[[np.ndarray], np.ndarray], most: float) -> None:
    """Early, late, falling, rising, flat and realistic curves of 160 checkpoints: share of the range that is lost."""
    losses = curve(np.linspace(1 / 160, 1, 160))
    search = searched(list(losses), [79, 159], 6)
    span = max(float(np.ptp(losses)), 1e-12)
    assert (losses[best_of(search)] - losses.min()) / span <= most


@given(st.integers(0, 2**32 - 1))
def test_noise_costs_no_more_than_noise(seed: int) -> None:
    """A valley under noise of a hundredth of its depth: what is lost is of the order of the noise."""
    random = np.random.default_rng(seed)
    truth = (np.linspace(0, 1, 100) - random.random()) ** 2
    search = searched(list(truth + random.normal(0, 0.01, 100)), [49, 99], 12)
    assert truth[best_of(search)] - truth.min() <= 0.1


def test_the_same_losses_lead_to_the_same_places() -> None:
    """What was scored can be looked up when a probe is started again."""
    losses = [(place - 23) ** 2.0 for place in range(80)]
    assert list(searched(losses, [40, 79], 6).losses) == list(searched(losses, [40, 79], 6).losses)


def test_more_evaluations_go_on_along_the_same_way() -> None:
    """A larger budget asks for what the smaller one asked for, and then for more."""
    losses = [(place - 23) ** 2.0 for place in range(80)]
    few, more = (list(searched(losses, [40, 79], number).losses) for number in (6, 9))
    assert more[:6] == few


def test_places_that_failed_are_not_asked_for_again() -> None:
    """They count as evaluations, and the search goes on around them."""
    losses = [float("nan") if place in (20, 79) else abs(place - 30.0) for place in range(80)]
    search = searched(losses, [20, 79], 8)
    assert search.losses
    assert not {20, 79} & set(search.losses)
    assert abs(best_of(search) - 30) <= 5


def test_all_failing_still_looks_elsewhere() -> None:
    """Failures everywhere: each evaluation tries another place."""
    assert searched([float("nan")] * 40, [20], 6).losses == {}
    assert next_places({}, {5, 20, 39}, 40) not in ([5], [20], [39])


def test_equal_losses_count_as_the_earlier() -> None:
    """On a plateau the search moves towards its beginning."""
    assert (
        next_places({10: 1.0, 50: 1.0, 90: 1.0}, {10, 50, 90}, 100)[0] < 10
        or next_places({10: 1.0, 50: 1.0, 90: 1.0}, {10, 50, 90}, 100)[0] < 50
    )


def test_it_begins_with_the_candidates_an_early_one_and_the_last() -> None:
    """An eighth is added where no candidate is early; two evaluations are left to close in."""
    assert first_places(160, [80, 159], 6) == [80, 159, 20]
    assert first_places(160, [80, 30, 159], 6) == [80, 30, 159]
    assert first_places(160, [], 6) == [79, 20, 159]
    assert first_places(160, [100, 90, 80, 70, 60], 6) == [100, 90, 20, 159]
    assert first_places(1, [0], 6) == [0]
    assert first_places(160, [80], 1) == [80]
