"""CS over the checkpoints: what enters it, which window, and how the series is aligned."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import checkpoints_of, layers_of, noisy, wavy

from lora_forensics.assess import assess
from lora_forensics.errors import SeriesError, UsageError
from lora_forensics.series import SERIES_COLUMNS, schema
from lora_forensics.similarity import SCOPE, SIMILARITIES, AssessOptions, choose_window
from lora_forensics.turning_point import cs_fluctuation, valleys


def series_of(layers: pl.DataFrame, checkpoints: pl.DataFrame | None = None, **options: Any) -> pl.DataFrame:
    """series.parquet of these tables."""
    return assess(layers, checkpoints, options=AssessOptions(**options)).series


def slow_cs(cosines: dict[str, list[float]]) -> tuple[list[int], dict[int, float], int, list[int]]:
    """The rule of the method in plain Python: places used, CS there, modules averaged, places dropped."""
    count = len(next(iter(cosines.values())))

    def defined(module: str, place: int) -> bool:
        return math.isfinite(cosines[module][place])

    dropped = [p for p in range(count) if sum(not defined(m, p) for m in cosines) > len(cosines) / 2]
    left = [p for p in range(count) if p not in dropped]
    averaged = [m for m in cosines if all(defined(m, p) for p in left)]
    if not averaged:
        return [], {}, 0, dropped
    cs = {p: math.fsum(cosines[m][p] for m in averaged) / len(averaged) for p in left}
    return left, cs, len(averaged), dropped


@st.composite
def cosines_with_holes(draw: st.DrawFn) -> dict[str, list[float]]:
    """Up to six modules at up to twelve checkpoints, with NaN anywhere, whole rows and columns included."""
    modules, count = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    value = st.one_of(st.floats(-1, 1), st.just(math.nan)) if draw(st.booleans()) else st.floats(-1, 1)
    table = {f"m{m}": draw(st.lists(value, min_size=count, max_size=count)) for m in range(modules)}
    for place in draw(st.sets(st.integers(0, count - 1), max_size=3)):
        for values in table.values():
            values[place] = math.nan
    return table


@given(cosines_with_holes(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=250)
def test_cs_equals_the_rule_in_plain_python(cosines: dict[str, list[float]], random: Any) -> None:
    """Checkpoints without most of their cosines go first, then modules with a gap; rows in any order."""
    rows = layers_of(cosines).rows(named=True)
    random.shuffle(rows)
    found = assess(pl.DataFrame(rows, schema=layers_of(cosines).schema))
    used, cs, modules, dropped = slow_cs(cosines)
    series = found.series.filter(~pl.col("interpolated"))
    assert series["step"].to_list() == [10 * (place + 1) for place in used]
    assert series["modules"].to_list() == [modules] * len(used)
    assert series["cosine"].to_list() == pytest.approx([cs[place] for place in used], rel=1e-12, abs=1e-15)
    told = [f.message for f in found.verdict.findings if f.rule == "checkpoint-undefined"]
    assert bool(told) == bool(dropped)
    if 0 < len(dropped) <= 4:
        assert all(str(10 * (place + 1)) in told[0] for place in dropped)


def test_a_checkpoint_with_exactly_half_of_its_cosines_stays() -> None:
    """More than half must be missing for a checkpoint to go; with exactly half, the modules go instead."""
    nan = math.nan
    series = series_of(layers_of({"a": [1, 2, 3], "b": [1, 2, 3], "c": [5, nan, 5], "d": [5, nan, 5]}))
    assert series["cosine"].to_list() == [1, 2, 3]
    assert series["modules"].to_list() == [2, 2, 2]
    series = series_of(layers_of({"a": [1, 2, 3], "b": [1, nan, 3], "c": [5, nan, 5]}))
    assert series["step"].to_list() == [10, 30]
    assert series["modules"].to_list() == [3, 3]


def test_a_missing_row_counts_as_a_missing_cosine() -> None:
    """A module that a checkpoint's file does not hold is like one without a cosine there."""
    layers = layers_of({"a": [1, 2, 3], "b": [3, 4, 5], "c": [9, 9, 9]})
    series = series_of(layers.filter(~((pl.col("module") == "c") & (pl.col("step") == 20))))
    assert series["cosine"].to_list() == [2, 3, 4]
    assert series["modules"].to_list() == [2, 2, 2]


@pytest.mark.parametrize("undefined", [math.nan, math.inf, -math.inf, None])
def test_what_is_not_finite_never_enters_an_average(undefined: float | None) -> None:
    """NaN, infinities and nulls are all no cosine."""
    series = series_of(layers_of({"a": [1, 2, 3], "b": [3, undefined, 5], "c": [5, 6, 7]}))
    assert series["cosine"].to_list() == [3, 4, 5]


def test_modules_without_a_base_weight_do_not_vote() -> None:
    """Nulls throughout mean no base weight: such modules are not in scope, however many they are."""
    series = series_of(layers_of({"a": [1, 2], "x": [None, None], "y": [None, None], "z": [None, None]}))
    assert series["cosine"].to_list() == [1, 2]
    assert series["modules"].to_list() == [1, 1]


def scoped(*components: str | None) -> pl.DataFrame:
    """One module of each component with its own level of CS: 1, 2, 3, ..."""
    frames = [
        layers_of({f"m{place}": [float(place)] * 3}).with_columns(component=pl.lit(component, pl.String))
        for place, component in enumerate(components, start=1)
    ]
    return pl.concat(frames)


@pytest.mark.parametrize("component", SCOPE)
def test_the_denoiser_or_language_model_alone_enters_cs(component: str) -> None:
    """Text encoders, and what is of no known part, are left out by default."""
    found = assess(scoped("text_encoder", component, "text_encoder_2", "other"))
    assert found.series["cosine"].to_list() == [2, 2, 2]
    assert found.verdict.components == (component,)


def test_a_run_with_only_text_encoders_uses_them() -> None:
    """Where there is no denoiser, everything there is enters CS, and the verdict says what that was."""
    found = assess(scoped("text_encoder", "text_encoder_2"))
    assert found.series["cosine"].to_list() == [1.5, 1.5, 1.5]
    assert set(found.verdict.components) == {"text_encoder", "text_encoder_2"}


@pytest.mark.parametrize(
    ("asked", "level"),
    [(("text_encoder",), 1.0), (("unet",), 2.0), (("text_encoder", "unet"), 1.5), (("all",), 2.0), (("all", "x"), 2.0)],
)
def test_components_are_those_asked_for(asked: tuple[str, ...], level: float) -> None:
    """--component names what enters CS, several times if wanted; all is all."""
    found = assess(scoped("text_encoder", "unet", "other"), options=AssessOptions(component=asked))
    assert found.series["cosine"].to_list() == [level] * 3


def test_a_component_that_is_not_there_is_bad_usage() -> None:
    """The error names what the run has."""
    with pytest.raises(UsageError, match="no module belongs to transformer") as caught:
        series_of(scoped("text_encoder", "unet"), component=("transformer",))
    assert "text_encoder" in caught.value.hint
    assert "unet" in caught.value.hint
    with pytest.raises(UsageError, match="component"):
        series_of(layers_of({"a": [1, 2, 3]}), component=("unet",))


def test_without_components_everything_enters() -> None:
    """A table that does not know its components is averaged whole."""
    found = assess(scoped(None, None, None), options=AssessOptions(component=("all",)))
    assert found.series["cosine"].to_list() == [2, 2, 2]
    assert found.verdict.components == ()


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_every_similarity_reads_its_own_column(similarity: str) -> None:
    """Contract over the table: CS-Fluctuation comes from the column that `--similarity` names."""
    layers = layers_of({"a": noisy(40, 1), "b": noisy(40, 2)})
    layers = layers.with_columns(cosine_rowwise=pl.col("cosine").reverse() * 2)
    series = series_of(layers, similarity=similarity, window="3")
    column = series[SIMILARITIES[similarity]]
    expected = cs_fluctuation(column.to_numpy(), 3)
    np.testing.assert_allclose(series["cs_fluctuation"].drop_nulls().to_numpy(), expected, rtol=1e-9)
    assert series["cosine"].to_list() != series["cosine_rowwise"].to_list()


def test_the_rule_of_cs_is_applied_to_the_similarity_that_is_read() -> None:
    """With row-wise similarity, gaps of the flat cosine take no module away, and the other way round."""
    layers = layers_of({"a": [1, math.nan, 3], "b": [1, 2, 3]}).with_columns(cosine_rowwise=pl.col("step") * 1.0)
    assert series_of(layers, similarity="rowwise")["modules"].to_list() == [2, 2, 2]
    assert series_of(layers, similarity="flat")["modules"].to_list() == [1, 1, 1]


def test_row_wise_similarity_needs_its_column() -> None:
    """A table with flat cosines only cannot be read row-wise: the error says so, it is no verdict."""
    with pytest.raises(SeriesError, match="rowwise") as caught:
        series_of(layers_of({"a": noisy(40)}), similarity="rowwise")
    assert caught.value.hint


@given(
    st.integers(9, 400),
    st.one_of(st.integers(1, 1000).map(float), st.floats(1, 1000)),
    st.one_of(st.none(), st.floats(1, 5000)),
)
@settings(deadline=None, max_examples=300)
def test_window_auto_is_the_clip_formula(count: int, cadence: float, epoch: float | None) -> None:
    """M = clip(round(W / cadence), 2, floor((T - 3) / 3)), W one epoch or else 100 steps; T fits it, always."""
    window = choose_window("auto", count, cadence, epoch)
    expected = min(max(round((epoch or 100) / cadence), 2), math.floor((count - 3) / 3))
    assert window.size == expected
    assert count >= 3 * expected + 3
    assert window.reason
    assert ("epoch" in window.reason) or ("100 steps" in window.reason)
    assert choose_window("epoch", count, cadence, epoch or 100.0).size == expected


@pytest.mark.parametrize("wanted", ["auto", "epoch"])
@pytest.mark.parametrize("count", range(9))
def test_below_nine_checkpoints_no_window_fits(wanted: str, count: int) -> None:
    """M = 2 needs nine; the window is unknown then, not 0 or 1."""
    assert choose_window(wanted, count, 10.0 if count > 1 else None, 50.0).size is None


@pytest.mark.parametrize("size", [2, 3, 50])
@pytest.mark.parametrize("count", [0, 5, 400])
def test_a_window_that_is_asked_for_is_used_as_it_is(size: int, count: int) -> None:
    """A number is never moved, not even where it does not fit: the status tells."""
    assert choose_window(str(size), count, None, None).size == size


def test_window_epoch_needs_an_epoch() -> None:
    """Where the trainer left no epoch, the error says what to pass."""
    with pytest.raises(UsageError, match="epoch") as caught:
        series_of(layers_of({"a": noisy(30)}), window="epoch")
    assert "--window" in caught.value.hint
    with_epochs = checkpoints_of(30, steps_per_epoch=40.0)
    assert series_of(layers_of({"a": noisy(30)}), with_epochs, window="epoch")["window"].unique().to_list() == [4]


@pytest.mark.parametrize(
    "bad",
    [
        {"window": "1"},
        {"window": "0"},
        {"window": "-3"},
        {"window": "2.5"},
        {"window": ""},
        {"window": "Auto"},
        {"detector": "algorithm2"},
        {"similarity": "cosine"},
        {"learning_rate": 0.0},
        {"learning_rate": -1e-4},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
    ],
    ids=lambda bad: "-".join(f"{k}={v}" for k, v in bad.items()),
)
def test_options_that_cannot_be_meant_are_bad_usage(bad: dict[str, Any]) -> None:
    """Every wrong option repeats what was given and says what would do."""
    with pytest.raises(UsageError) as caught:
        AssessOptions(**bad)
    assert str(next(iter(bad.values()))) in caught.value.message
    assert caught.value.hint


def test_the_cadence_is_the_median_distance_of_the_checkpoints_used() -> None:
    """A dropped first checkpoint and one gap do not change the window."""
    layers = layers_of({"a": [math.nan, *noisy(40)]})
    layers = layers.with_columns(step=pl.when(pl.col("step") > 300).then(pl.col("step") + 500).otherwise("step"))
    found = assess(layers)
    assert found.verdict.cadence_steps == 10
    assert found.verdict.window == 10


@given(st.integers(2, 6), st.integers(0, 45), st.integers(0, 500))
@settings(deadline=None, max_examples=60)
def test_the_series_is_start_aligned_with_nulls_at_the_tail(window: int, count: int, seed: int) -> None:
    """Value j stands in the row of checkpoint j; every column ends where its windows do; the support's end is named."""
    rates = np.random.default_rng(seed).uniform(1e-5, 1e-3, count).tolist()
    cosine = noisy(count, seed)
    series = series_of(layers_of({"a": cosine}), checkpoints_of(count, learning_rate=rates), window=str(window))
    assert len(series) == count
    lengths = {"cosine_ma": window - 1, "slope": window, "slope_ma": 2 * window - 1, "cs_fluctuation": 3 * window - 2}
    for name, lost in lengths.items():
        there = max(0, count - lost)
        assert series[name].head(there).null_count() == 0
        assert series[name].tail(count - there).null_count() == count - there
    expected = cs_fluctuation(cosine, window, rates)
    values = series["cs_fluctuation"].drop_nulls().to_numpy()
    np.testing.assert_allclose(values, expected, rtol=1e-9)
    bottoms = valleys(expected).tolist()
    assert {i: v for i, v in enumerate(series["valley"]) if v is not None} == {b: n for n, b in enumerate(bottoms, 1)}
    ends = series["support_end_step"].to_list()
    assert ends[: values.size] == [10 * (j + 3 * window - 1) for j in range(values.size)]
    assert set(ends[values.size :]) <= {None}


def test_the_series_has_the_documented_columns_and_types_always() -> None:
    """With values and without any: the schema is the same."""
    promised = schema(SERIES_COLUMNS)
    for layers in (layers_of({"a": wavy(30)}), layers_of({"a": wavy(2)}), layers_of({"a": []}), layers_of({})):
        series = series_of(layers)
        assert dict(list(series.schema.items())[: len(promised)]) == promised


def test_means_of_the_other_metrics_stand_beside_cs() -> None:
    """Every metric is averaged over the same modules as CS; its NaN do not spread."""
    layers = layers_of({"a": noisy(12), "b": noisy(12, 1)}).with_columns(
        delta_norm=pl.when(module="a").then(2.0).otherwise(4.0),
        rotation=pl.when(pl.col("step") == 10).then(math.nan).otherwise(0.5),
    )
    series = series_of(layers)
    assert series["mean_delta_norm"].to_list() == [3.0] * 12
    assert series["mean_rotation"].to_list() == [None] + [0.5] * 11


def test_one_unknown_rate_makes_all_rates_one() -> None:
    """A rate that is not known anywhere is taken as 1 throughout, and a finding says so."""
    rates: list[float | None] = [1e-4] * 30
    cosine = noisy(30)
    for unknown in (None, math.nan):
        rates[17] = unknown
        found = assess(layers_of({"a": cosine}), checkpoints_of(30, learning_rate=list(rates)))
        values = found.series["cs_fluctuation"].drop_nulls().to_numpy()
        assert found.verdict.window is not None
        np.testing.assert_allclose(values, cs_fluctuation(cosine, found.verdict.window), rtol=1e-9)
        assert [f.rule for f in found.verdict.findings].count("learning-rate-unknown") == 1


def test_known_rates_are_used_and_a_given_rate_overrules_them() -> None:
    """Recorded rates divide value by value; --learning-rate replaces them all, and there is nothing to complain of."""
    cosine, rates = noisy(30), np.linspace(1e-3, 1e-5, 30).tolist()
    for options, expected in (({}, rates), ({"learning_rate": 0.5}, 0.5)):
        found = assess(
            layers_of({"a": cosine}),
            checkpoints_of(30, learning_rate=rates),
            options=AssessOptions(window="3", **options),
        )
        values = found.series["cs_fluctuation"].drop_nulls().to_numpy()
        np.testing.assert_allclose(values, cs_fluctuation(cosine, 3, expected), rtol=1e-9)
        assert "learning-rate-unknown" not in {f.rule for f in found.verdict.findings}


def test_a_schedule_that_starts_at_zero_keeps_the_other_values() -> None:
    """A warm-up that logs 0 first gives NaN there and nowhere else."""
    rates = [0.0, *[1e-4] * 29]
    series = series_of(layers_of({"a": noisy(30)}), checkpoints_of(30, learning_rate=rates), window="3")
    assert series["cs_fluctuation"].is_nan().to_list()[:23] == [True] + [False] * 22


def test_the_official_detector_leaves_out_the_learning_rate() -> None:
    """The released code does not divide: its answer in a scan is `official_stop`'s, whatever the schedule."""
    from lora_forensics.turning_point import official_stop

    for seed in range(40):
        cosine, rates = noisy(50, seed), np.geomspace(1e-2, 1e-7, 50).tolist()
        options = AssessOptions(window="3", detector="official")
        found = assess(layers_of({"a": cosine}), checkpoints_of(50, learning_rate=rates), options=options)
        expected = official_stop(cosine, 3)
        turning = found.verdict.turning_point
        assert (turning and turning.index) == (expected and expected[1])
        assert (turning and turning.support_end_step) == (expected and 10 * (expected[0] + 1))
