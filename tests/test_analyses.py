"""What the papers measure: every column against a float64 dense reference, and how a run's course is read."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from factories import KOHYA_MODULES, kohya_base, kohya_metadata, lora_factors, peft_run
from runs import only
from safetensors.torch import load_file, save_file
from tables import checkpoints_of, layers_of, wavy

from lora_forensics.analyses.frozen import Frozen, leading_triples
from lora_forensics.analyses.intruders import intruders
from lora_forensics.assess import assess
from lora_forensics.course import course_of, modules_of, resets
from lora_forensics.errors import UsageError
from lora_forensics.evidence import movement
from lora_forensics.measure import Measured, MeasureOptions, measure_run
from lora_forensics.metrics import METRICS
from lora_forensics.moments import DenseScaledChange, GivenChange, LowRankChange, ScaledChange, Weight

METRIC = {metric.column.name: metric.compute for metric in METRICS}
ALL = ("columns", "intruders", "subspace")


@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_factors_turn_and_move_as_they_do_in_the_files(tmp_path: Path, memory: int) -> None:
    """Rotations look back one checkpoint, the way of A to the run's first, in one unit of work or in many."""
    written = peft_run(tmp_path, steps=range(10, 60, 10))
    layers = measure_run(only(written.path), written.base, options=MeasureOptions(memory=memory)).layers
    files = [load_file(written.path / f"checkpoint-{step}" / "adapter_model.safetensors") for step in written.steps]
    for (module,), part in layers.group_by("module"):
        a, b = ([file[f"{module}.lora_{side}.weight"].double().flatten() for file in files] for side in "AB")
        for index, row in enumerate(part.sort("step").iter_rows(named=True)):
            moved = (a[index] - a[0]).norm() / a[0].norm()
            assert row["down_moved"] == pytest.approx(moved.item(), rel=1e-6, abs=1e-9)
            for factor, column in ((a, "down_rotation"), (b, "up_rotation")):
                if index:
                    turned = 1 - torch.nn.functional.cosine_similarity(factor[index], factor[index - 1], dim=0)
                    assert row[column] == pytest.approx(turned.item(), rel=1e-6, abs=1e-12)


def test_asked_for_analyses_equal_their_dense_definitions(tmp_path: Path) -> None:
    """Columns, intruder dimensions and the leading subspace, by peft's own changes and numpy's decomposition."""
    written = peft_run(tmp_path, steps=[10, 20], init_lora_weights=False)
    cache = tmp_path / "cache"
    layers = measure_run(only(written.path), written.base, options=MeasureOptions(analyses=ALL, cache=cache)).layers
    found_some = 0
    for index, step in enumerate(written.steps):
        for name, delta in written.deltas[index].items():
            module = f"base_model.model.{name.removeprefix('base_model.model.')}"
            (row,) = layers.filter((pl.col("step") == step) & (pl.col("module") == module)).to_dicts()
            w, d = written.weights[name].numpy(), delta.numpy()
            norms = [np.linalg.norm(m, axis=0) for m in (w, w + d)]
            cosine = (w * (w + d)).sum(axis=0) / (norms[0] * norms[1])
            assert row["magnitude_change_columns"] == pytest.approx(np.abs(norms[1] - norms[0]).mean(), rel=1e-5)
            assert row["direction_change_columns"] == pytest.approx((1 - cosine).mean(), rel=1e-5)
            u, s, vt = np.linalg.svd(w, full_matrices=False)
            y, after, _ = np.linalg.svd(w + d, full_matrices=False)
            nearest = np.abs(u.T @ y[:, :10]).max(axis=0)
            assert row["intruder_dimensions"] == (nearest < 0.5).sum()
            assert row["intruder_cosine"] == pytest.approx(nearest.min(), rel=1e-4)
            inside = np.linalg.norm(u[:, :4].T @ d @ vt[:4].T) ** 2 / np.linalg.norm(d) ** 2
            assert row["subspace_share"] == pytest.approx(inside, rel=1e-4)
            moved = np.linalg.norm(after[:4] - s[:4]) / np.linalg.norm(s[:4])
            assert row["singular_value_change"] == pytest.approx(moved, rel=1e-4)
            found_some += row["intruder_dimensions"]
    assert found_some
    assert len(list(cache.iterdir())) == len(written.weights)


def test_a_planted_intruder_is_found_and_a_scaled_weight_has_none() -> None:
    """One large new direction on a weight with a steep spectrum is one intruder; W grown by a tenth has none."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q for n in (64, 40))
    weight = (left[:, :40] * torch.arange(40, 0, -1)) @ right.T
    frozen = Frozen(weight)
    planted = 60 * torch.outer(left[:, 50], right[:, 39])
    assert intruders.compute(frozen, planted, 4) == (1, pytest.approx(1 / 60, rel=1e-3))
    assert intruders.compute(frozen, 0.1 * weight, 4) == (0, pytest.approx(1, abs=1e-6))


@pytest.mark.parametrize("shape", [(600, 700), (700, 600)])
def test_leading_triples_by_products_are_those_of_the_decomposition(shape: tuple[int, int]) -> None:
    """Sides that are too long for a full decomposition, on a flat spectrum: the hard case."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, values, right = leading_triples(matrix, 10)
    expected = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(values, expected.S[:10], rtol=1e-9, atol=0)
    for found, true in ((left, expected.U[:, :10]), (right.mT, expected.Vh[:10].mT)):
        torch.testing.assert_close(
            (found * true).sum(dim=0).abs(), torch.ones(10, dtype=torch.float64), rtol=1e-7, atol=0
        )


def test_a_decomposition_is_made_once_and_a_damaged_one_again(tmp_path: Path) -> None:
    """What lies in the folder is what is used; a truncated file is made anew; another weight has its own."""
    weight = torch.randn(12, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    true = Frozen(weight, tmp_path, "a").decomposition
    (kept,) = tmp_path.iterdir()
    tensors = load_file(kept)
    save_file({**tensors, "values": tensors["values"] * 2}, kept)
    torch.testing.assert_close(Frozen(weight, tmp_path, "a").decomposition.values, true.values * 2)
    kept.write_bytes(kept.read_bytes()[:40])
    torch.testing.assert_close(Frozen(weight, tmp_path, "a").decomposition.values, true.values)
    Frozen(weight, tmp_path, "b").decomposition  # noqa: B018
    assert len(list(tmp_path.iterdir())) == 2


def test_columns_that_were_paid_for_are_kept(tmp_path: Path) -> None:
    """A later measurement that asks for fewer reuses the rows; one that asks for more does not."""
    written = peft_run(tmp_path, steps=[10, 20])
    run = only(written.path)

    def measure(known: Measured | None, *names: str) -> Measured:
        return measure_run(run, written.base, known=known, options=MeasureOptions(analyses=names))

    first = measure(None, "intruders")
    fewer = measure(first)
    assert fewer.new == 0
    assert fewer.layers.equals(first.layers)
    assert measure(fewer, "intruders", "columns").new == 2


def test_a_broken_checkpoint_has_no_analysis_and_its_neighbours_do(tmp_path: Path) -> None:
    """NaN in a file is NaN, or null for a count, in its own rows only."""
    written = peft_run(tmp_path, steps=[10, 20, 30])
    file = written.path / "checkpoint-20" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "q_proj.lora_B" in name)
    tensors[name][0, 0] = math.nan
    save_file(tensors, file, {"format": "pt"})
    layers = measure_run(only(written.path), written.base, options=MeasureOptions(analyses=ALL)).layers
    part = layers.filter(pl.col("module") == name.removesuffix(".lora_B.weight")).sort("step")
    assert part["intruder_dimensions"].is_null().to_list() == [False, True, False]
    for column in ("magnitude_change_columns", "intruder_cosine", "subspace_share", "down_moved"):
        assert part[column].is_nan().to_list() == [False, True, False], column


def test_16_bit_factors_move_as_their_numbers_do() -> None:
    """Differences are taken in float32, not in the stored type."""
    down = torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    change = LowRankChange(down, torch.ones(3, 6, 4).bfloat16(), torch.ones(3, dtype=torch.float64))
    found = METRIC["down_moved"](change.moments(None, torch.device("cpu")))
    wide = down.double()
    expected = (wide - wide[0]).flatten(1).norm(dim=1) / wide[0].norm()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_an_unknown_analysis_is_bad_usage() -> None:
    """With the names that there are."""
    with pytest.raises(UsageError, match="no analysis is called 'svd'") as caught:
        MeasureOptions(analyses=("svd",))
    assert "intruders" in caught.value.hint


def test_scales_and_sparse_changes_are_described() -> None:
    """Factors of rows as they are stored; entries that differ from the frozen weight."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, generator=generator)
    factors = 1 + 0.1 * torch.randn(3, 6, generator=generator)
    read = Weight(6, 5, lambda a, b: weight[a:b])
    moments = ScaledChange(factors, False, False, 0).moments(read, torch.device("cpu"))
    wide = factors.double()
    for name, expected in (
        ("scale_mean", wide.mean(dim=1)),
        ("scale_spread", wide.std(dim=1, correction=0)),
        ("scale_carried", (wide - 1).square().mean(dim=1).sqrt()),
    ):
        torch.testing.assert_close(METRIC[name](moments), expected)
    saved = weight.expand(2, 6, 5).clone()
    saved[1, 2, 3] += 1
    saved[1, 0] *= 2
    sparse = GivenChange(saved, less_weight=True).moments(read, torch.device("cpu"))
    assert METRIC["changed_share"](sparse).tolist() == [0, 6 / 30]


def test_magnitudes_around_a_change_that_is_formed_as_a_matrix_have_scales_too() -> None:
    """By rows and by columns; of a broken checkpoint they are NaN, and a predecessor is none of them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, generator=generator).double()
    deltas = 0.1 * torch.randn(4, 6, 5, generator=generator).double()
    read = Weight(6, 5, lambda a, b: weight[a:b])
    for axis, size in ((1, 6), (0, 5)):
        magnitudes = 2 + torch.rand(4, size, generator=generator).double()
        expected = (magnitudes / (weight + deltas).norm(dim=axis + 1))[1:]
        magnitudes[2, 0] = math.nan
        change = DenseScaledChange(magnitudes, axis == 0, 1, GivenChange(deltas, 1))
        found = METRIC["scale_mean"](change.moments(read, torch.device("cpu")))
        assert found.isnan().tolist() == [False, True, False]
        torch.testing.assert_close(found[[0, 2]], expected.mean(dim=1)[[0, 2]])
        assert "scales" not in change.moments(None, torch.device("cpu")).known


def merged_run(folder: Path, segments: int, each: int, redraw: bool) -> Path:
    """A kohya run whose adapter is merged away and begun anew after every `each` checkpoints."""
    folder.mkdir()
    for number in range(segments * each):
        segment, place = divmod(number, each)
        step = 10 * (number + 1)
        tensors = lora_factors(KOHYA_MODULES, 10 * (place + 1))
        if redraw:
            generator = torch.Generator().manual_seed(100 + segment)
            tensors |= {
                name: torch.randn(t.shape, generator=generator) for name, t in tensors.items() if "lora_down" in name
            }
        save_file(tensors, folder / f"name-step{step:08d}.safetensors", kohya_metadata(step, step // 20))
    return folder


@pytest.mark.parametrize("redraw", [True, False], ids=["A redrawn", "A kept"])
def test_a_merged_run_is_cut_at_its_last_reset(tmp_path: Path, redraw: bool) -> None:
    """Chain-of-LoRA redraws A, PeriodicLoRA may keep it; the verdict is that of the last segment alone."""
    run = only(merged_run(tmp_path / "run", 3, 12, redraw))
    measured = measure_run(run, kohya_base(tmp_path / "base"))
    assert resets(measured.layers) == [130, 250]
    whole = assess(measured.layers, measured.checkpoints, measured.notes)
    (finding,) = [f for f in whole.verdict.findings if f.rule == "reset"]
    assert "130, 250" in finding.message
    assert whole.series["step"].to_list() == list(range(250, 370, 10))
    alone = [frame.filter(pl.col("step") >= 250) for frame in (measured.layers, measured.checkpoints)]
    last = assess(*alone)
    assert whole.verdict.keep == last.verdict.keep
    assert whole.verdict.turning_point == last.verdict.turning_point
    assert whole.verdict.evidence["steps"] == [10, 360]


def test_ordinary_runs_have_no_resets(sample_runs: Path, tmp_path: Path) -> None:
    """Neither a run that wanders nor an empty or broken file in the middle of one is a new start."""
    written = peft_run(tmp_path)
    layers = measure_run(only(written.path), written.base).layers
    assert resets(layers) == []

    def with_one(step: int, norm: float, *columns: str) -> pl.DataFrame:
        at = pl.when(pl.col("step") == step)
        return layers.with_columns(at.then(norm).otherwise(name).alias(name) for name in columns)

    assert resets(with_one(60, 0.0, "delta_norm", "down_norm")) == []
    assert resets(with_one(60, math.nan, "delta_norm")) == []
    assert resets(with_one(120, 0.0, "delta_norm")) == []
    assert resets(with_one(60, 0.0, "delta_norm")) == [60]  # A is there and B is zero: begun anew


def test_the_course_is_that_of_the_dense_changes(tmp_path: Path) -> None:
    """Path, straightness, angle and correlation over all modules together, by peft's own changes."""
    written = peft_run(tmp_path, steps=range(10, 60, 10))
    measured = measure_run(only(written.path), written.base)
    found = assess(measured.layers, measured.checkpoints).series
    path = 0.0
    flat = [torch.cat([delta.flatten() for delta in deltas.values()]) for deltas in written.deltas]
    for index, row in enumerate(found.iter_rows(named=True)):
        path += (flat[index] - (flat[index - 1] if index else 0)).norm().item()
        assert row["path_length"] == pytest.approx(path, rel=1e-6)
        assert row["directness"] == pytest.approx(flat[index].norm().item() / path, rel=1e-6)
        if index:
            cosine = torch.nn.functional.cosine_similarity(flat[index], flat[index - 1], dim=0).item()
            assert row["angle"] == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-5)
        at = measured.layers.filter(pl.col("step") == row["step"])
        expected = np.corrcoef(at["magnitude_change"].to_numpy(), at["direction_change"].to_numpy())[0, 1]
        assert row["magnitude_direction"] == pytest.approx(expected, rel=1e-9)
    assert [w["analysis"] for w in assess(measured.layers).verdict.evidence["analyses"]][:2] == [
        "magnitude_direction",
        "directness",
    ]


def test_the_angle_counts_modules_that_were_zero() -> None:
    """As in a run in which only some modules have B = 0 at the first checkpoint."""
    layers = pl.DataFrame(
        {
            "run": "r", "step": [10, 10, 20, 20], "module": ["a", "b", "a", "b"], "component": "model", "role": "q",
            "adapter": "lora", "delta_norm": [2.0, 0.0, 3.0, 4.0], "rotation": [None, None, 0.0, math.nan],
            "step_size": [None, None, 1.0, 4.0],
        },
        schema_overrides={"rotation": pl.Float64, "step_size": pl.Float64},
    )  # fmt: skip
    places = pl.DataFrame({"step": [10, 20]})
    course = course_of(layers, places, modules_of(layers, places))
    assert course["angle"].to_list() == [None, pytest.approx(math.degrees(math.acos(3 / 5)))]


def test_what_needs_no_base_model_is_told_without_one(tmp_path: Path) -> None:
    """Norms, spectra, rotation and path are the same numbers as with it, in the series and in the tables."""
    written = peft_run(tmp_path)
    run = only(written.path)
    known, alone = measure_run(run, written.base), measure_run(replace(run, base=type(run.base)()))
    with_base, without = (assess(m.layers, m.checkpoints, m.notes) for m in (known, alone))
    assert without.verdict.status == "no_base_model"
    assert "without-base" in [f.rule for f in without.verdict.findings]
    means = ("mean_delta_norm", "mean_effective_rank", "mean_rotation", "mean_down_moved")
    for column in ("path_length", "directness", "angle", *means):
        np.testing.assert_allclose(
            without.series[column].cast(pl.Float64).fill_null(math.nan),
            with_base.series[column].cast(pl.Float64).fill_null(math.nan),
            rtol=1e-9,
        )
    assert without.series["cosine"].null_count() == len(without.series) == 12
    assert without.series["magnitude_direction"].null_count() == 12
    assert without.modules["path_length"].to_list() == pytest.approx(with_base.modules["path_length"].to_list())


def settling(rates: list[float] | None) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Module a slows down to a twentieth from checkpoint 8 on, b moves on; or both only follow the rate."""
    count = 20
    layers = layers_of({"a": wavy(count), "b": wavy(count)}).with_columns(
        delta_norm=pl.lit(1.0), component=pl.lit("unet")
    )
    place = pl.col("step") // 10
    slow = (pl.col("module") == "a") & (place > 8)
    layers = layers.with_columns(step_size=pl.when(place == 1).then(math.nan).when(slow).then(0.05).otherwise(1.0))
    dose = np.cumsum(rates).tolist() if rates else [None] * count
    if rates:
        rate = place.replace_strict({n + 1: r for n, r in enumerate(rates)}, return_dtype=pl.Float64)
        layers = layers.with_columns(step_size=pl.col("step_size") * rate)
    return layers, checkpoints_of(count).with_columns(pl.Series("dose", dose, dtype=pl.Float64))


@pytest.mark.parametrize("rates", [None, np.linspace(1, 0.01, 20).tolist()], ids=["constant", "decaying"])
def test_a_module_has_settled_where_it_stays_slow(rates: list[float] | None) -> None:
    """From its first slow checkpoint on, whatever the rate does to all of them."""
    layers, places = settling(rates)
    modules = modules_of(assess_ready(layers), places)
    assert dict(modules.select("module", "settled_step").iter_rows()) == {"a": 90, "b": None}
    course = course_of(assess_ready(layers), places, modules)
    assert course["settled"].to_list() == [0.0] * 8 + [0.5] * 12
    moved = movement(layers.filter(pl.col("module") == "a"))["moved"].sum()
    assert modules["path_length"][0] == pytest.approx(moved)
    rules = [f.rule for f in assess(layers, places).verdict.findings]
    assert "settled" in rules


def assess_ready(layers: pl.DataFrame) -> pl.DataFrame:
    """With the columns that assess adds."""
    return layers.with_columns(role=pl.lit("q"), adapter=pl.lit("lora"))


def test_scales_carry_on_through_a_component() -> None:
    """The product of the mean scales up to each module, by component; null where nothing is scaled."""
    layers = layers_of({"a": [0.1], "b": [0.1], "c": [0.1], "d": [0.1]})
    scale = pl.col("module").replace_strict({"a": 1.1, "b": 1.2, "c": None, "d": 2.0}, return_dtype=pl.Float64)
    owner = pl.when(pl.col("module") == "d").then(pl.lit("text_encoder")).otherwise(pl.lit("unet"))
    modules = modules_of(assess_ready(layers).with_columns(component=owner, scale_mean=scale), checkpoints_of(1))
    assert modules["scale_through"].to_list() == [1.1, pytest.approx(1.32), None, 2.0]
