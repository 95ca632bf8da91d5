"""The arithmetic of products of thin factors, against dense float64 matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_forensics.average.factors import balanced, distance, norm, truncated, weighted_sum


def pairs(seed: int, count: int, rows: int, columns: int, rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random factors."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(rows, rank, generator=generator).double(),
            torch.randn(rank, columns, generator=generator).double(),
        )
        for _ in range(count)
    ]


def dense(found: list[tuple[torch.Tensor, torch.Tensor]], weights: list[float]) -> torch.Tensor:
    """The sum, formed."""
    terms = [weight * (up @ down) for weight, (up, down) in zip(weights, found, strict=True)]
    return torch.stack(terms).sum(dim=0)


SIZES = {
    "seed": st.integers(0, 999),
    "count": st.integers(1, 5),
    "rows": st.integers(1, 12),
    "columns": st.integers(1, 12),
    "rank": st.integers(1, 5),
}


@given(**SIZES, asked=st.integers(1, 30))
def test_the_sum_is_cut_to_the_nearest_product(
    seed: int, count: int, rows: int, columns: int, rank: int, asked: int
) -> None:
    """Its error is that of the dense decomposition, and nothing once the rank is that of the sum."""
    found = pairs(seed, count, rows, columns, rank)
    weights = [(place + 1) / 7 for place in range(count)]
    whole, true = weighted_sum(found, weights), dense(found, weights)
    up, down = balanced(whole, asked)
    assert up.shape == (rows, asked)
    assert down.shape == (asked, columns)
    values = torch.linalg.svdvals(true)
    assert float((up @ down - true).norm()) == pytest.approx(
        float(values[asked:].norm()), abs=1e-10 * float(true.norm())
    )
    assert norm(whole) == pytest.approx(float(true.norm()), rel=1e-12)
    assert distance(whole, (up, down)) == pytest.approx(float(values[asked:].norm()), abs=1e-12 * float(true.norm()))


@given(**SIZES)
def test_singular_values_are_those_of_the_matrix(seed: int, count: int, rows: int, columns: int, rank: int) -> None:
    """Also where the sum of ranks is larger than the matrix; zeros follow."""
    found = pairs(seed, count, rows, columns, rank)
    _, values, _ = truncated(weighted_sum(found, [1.0] * count), 40)
    true = torch.linalg.svdvals(dense(found, [1.0] * count))
    assert torch.allclose(values[: len(true)], true, rtol=1e-10, atol=1e-12 * float(true[0]))
    assert values[len(true) :].abs().max() < 1e-12 * true[0]


def test_a_tiny_difference_is_not_lost_in_cancellation() -> None:
    """A ten-thousand-millionth of the norm, which traces of Grams cannot tell from nothing."""
    ((up, down),) = pairs(0, 1, 30, 20, 3)
    moved = up + 1e-10 * torch.ones_like(up)
    true = float((1e-10 * torch.ones_like(up) @ down).norm())
    assert distance((up, down), (moved, down)) == pytest.approx(true, rel=1e-4)
