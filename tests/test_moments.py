"""Row moments and metrics against dense float64 references."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import LOOKS_BACK, METRIC, dense

from lora_forensics.metrics import METRICS
from lora_forensics.moments import SMALL_WEIGHT, LowRankChange, Moments, Weight, full_precision


def factors(
    count: int, rows: int, columns: int, rank: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W, and factors that move a little from checkpoint to checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    down = torch.randn(1, rank, columns, generator=generator) + 0.05 * torch.randn(
        count, rank, columns, generator=generator
    )
    up = 0.01 * torch.randn(count, rows, rank, generator=generator).cumsum(dim=0)
    return weight, down, up


def moments_of(
    weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, device: torch.device, scale: float = 0.5, lead: int = 0
) -> Moments:
    """The pass, with a weight that is read by rows."""
    scales = torch.full((len(down),), scale, dtype=torch.float64)
    with full_precision():
        return LowRankChange(down, up, scales, lead).moments(Weight(*weight.shape, lambda a, b: weight[a:b]), device)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 40), rank=st.integers(1, 6), count=st.integers(1, 5),
    seed=st.integers(0, 1000), lead=st.integers(0, 1),
)  # fmt: skip
def test_every_metric_equals_its_dense_definition(
    rows: int, columns: int, rank: int, count: int, seed: int, lead: int
) -> None:
    """Whatever the shape, rank and number of checkpoints, factored and dense agree."""
    weight, down, up = factors(count + lead, rows, columns, rank, seed)
    moments = moments_of(weight, down, up, torch.device("cpu"), lead=lead)
    deltas = 0.5 * up.double() @ down.double()
    for index in range(count):
        before = deltas[index + lead - 1] if index + lead else None
        for name, expected in dense(weight.double(), deltas[index + lead], before).items():
            found = METRIC[name](moments)[index].item()
            loose = name in ("direction_change", "rotation", "stable_rank", "effective_rank", "layer_rotation")
            assert found == pytest.approx(expected, rel=1e-5 if loose else 1e-8, abs=1e-9), (name, index)


@pytest.mark.parametrize("shape", [(16, 16), (320, 320), (640, 2048), (1280, 320 * 9), (2048, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_cosines_stay_within_the_error_budget(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """2e-8 absolute against dense float64 on the numbers as they are stored, on every device."""
    weight, down, up = (tensor.to(dtype) for tensor in factors(4, *shape, rank=8))
    moments = moments_of(weight, down, up, device)
    for index in range(4):
        wide, delta = weight.double(), up[index].double() @ down[index].double()
        flat = (wide * delta).sum() / (wide.norm() * delta.norm())
        rowwise = torch.nn.functional.cosine_similarity(wide, delta, dim=1).mean()
        assert abs(METRIC["cosine"](moments)[index] - flat) < 2e-8
        assert abs(METRIC["cosine_rowwise"](moments)[index] - rowwise) < 2e-8


def test_both_precisions_of_the_product_are_covered() -> None:
    """The shapes above lie on both sides of the switch from float64 to float32."""
    assert 16 * 16 < SMALL_WEIGHT < 640 * 2048


def test_rows_in_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A working memory of a few rows gives the same moments as one block."""
    weight, down, up = factors(3, 50, 20, 4)
    whole = moments_of(weight, down, up, torch.device("cpu"))
    monkeypatch.setattr("lora_forensics.moments.arithmetic.WORKING_BYTES", 5000)
    parts = moments_of(weight, down, up, torch.device("cpu"))
    for name in METRIC:
        torch.testing.assert_close(METRIC[name](parts), METRIC[name](whole), rtol=1e-12, atol=1e-15, equal_nan=True)


def test_a_zero_change_has_no_cosine_and_no_size() -> None:
    """B = 0 gives NaN for what is undefined, and 0 for norms."""
    weight, down, up = factors(2, 8, 8, 2)
    moments = moments_of(weight, down, torch.zeros_like(up), torch.device("cpu"))
    for name in ("cosine", "cosine_rowwise", "stable_rank", "effective_rank", "rotation"):
        assert METRIC[name](moments).isnan().all(), name
    for name in ("delta_norm", "relative_norm", "magnitude_change", "direction_change", "spectral_norm", "up_norm"):
        assert (METRIC[name](moments) == 0).all(), name
    assert METRIC["step_size"](moments)[1] == 0


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nonfinite_entries_stay_in_their_checkpoint(poison: float) -> None:
    """NaN or Inf in one checkpoint leaves its neighbours' metrics as they were, and is counted."""
    weight, down, up = factors(3, 8, 12, 2)
    clean = moments_of(weight, down, up, torch.device("cpu"))
    broken = up.clone()
    broken[1, 3, 0] = poison
    moments = moments_of(weight, down, broken, torch.device("cpu"))
    assert moments.nonfinite.tolist() == [0, 1, 0]
    for name in METRIC:
        if name in ("nonfinite", "base_norm"):
            continue
        values = METRIC[name](moments)
        assert values[1].isnan(), name
        torch.testing.assert_close(values[0], METRIC[name](clean)[0], equal_nan=True, rtol=1e-12, atol=0)
        if name not in LOOKS_BACK:
            torch.testing.assert_close(values[2], METRIC[name](clean)[2], equal_nan=True, rtol=1e-12, atol=0)


def test_without_a_base_only_what_needs_one_is_missing() -> None:
    """Norms, spectra and movement need no frozen weight."""
    weight, down, up = factors(3, 8, 12, 2)
    scale = torch.ones(3, dtype=torch.float64)
    moments = LowRankChange(down, up, scale).moments(None, torch.device("cpu"))
    known = moments_of(weight, down, up, torch.device("cpu"), scale=1.0)
    for metric in METRICS:
        values = metric.compute(moments)
        if "weight" in metric.needs:
            assert values.isnan().all()
        else:
            torch.testing.assert_close(values, metric.compute(known), equal_nan=True)


def test_a_negative_scale_turns_the_cosine_and_nothing_else() -> None:
    """Norms and singular values are those of the change, not of its sign."""
    weight, down, up = factors(1, 8, 12, 2)
    plus, minus = (moments_of(weight, down, up, torch.device("cpu"), scale=scale) for scale in (0.5, -0.5))
    assert METRIC["cosine"](minus) == -METRIC["cosine"](plus)
    for name in ("delta_norm", "spectral_norm", "effective_rank"):
        assert METRIC[name](minus) == METRIC[name](plus)


def test_full_precision_is_restored() -> None:
    """The calling program's setting of float32 products comes back."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_every_metric_is_documented() -> None:
    """A column without a meaning, or two of one name, would not be documented."""
    names = [metric.column.name for metric in METRICS]
    assert len(set(names)) == len(names)
    assert all(metric.column.meaning for metric in METRICS)


def test_whole_numbers_are_numbers() -> None:
    """Nobody saves an adapter as integers; if somebody does, it is measured and not a crash."""
    weight, down, up = factors(2, 8, 12, 2)
    whole = [(tensor * 100).to(torch.int32) for tensor in (down, up)]
    found = moments_of(weight, whole[0], whole[1], torch.device("cpu"))
    expected = moments_of(weight, whole[0].float(), whole[1].float(), torch.device("cpu"))
    torch.testing.assert_close(METRIC["cosine"](found), METRIC["cosine"](expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64, 48, 4), (320, 640, 8)])
def test_the_predicted_storage_noise_is_what_rounding_does(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Over 80 unrelated adapters, the rounding error of the cosine has the predicted deviation within a quarter."""
    rows, columns, rank = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    down, up = torch.randn(80, rank, columns, generator=generator), torch.randn(80, rows, rank, generator=generator)
    exact = METRIC["cosine"](moments_of(weight, down, up, torch.device("cpu")))
    stored = moments_of(weight, down.to(dtype), up.to(dtype), torch.device("cpu"))
    error = (METRIC["cosine"](stored) - exact).square().mean().sqrt()
    assert METRIC["cosine_noise"](stored).mean().item() == pytest.approx(error.item(), rel=0.25)
