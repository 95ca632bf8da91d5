"""The verdict: statuses in their order, what it rests on, and what may be missing from the tables."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import checkpoints_of, layers_of, noisy, straight, wavy

import lora_forensics as lf
from lora_forensics.assess import assess
from lora_forensics.detectors import DETECTORS
from lora_forensics.errors import SeriesError, UsageError
from lora_forensics.records import RunNotes, Skipped, Status, Verdict
from lora_forensics.series import CHECKPOINT_COLUMNS, MODULE_COLUMNS, schema
from lora_forensics.similarity import SIMILARITIES, AssessOptions

PROMISED = {
    "schema": int,
    "run": str,
    "status": str,
    "keep": {"checkpoint", "step", "epoch", "rests_on"},
    "turning_point": {"step", "epoch", "index", "support_end_step"},
    "candidates": list,
    "evidence": {"held_out"},
    "last_is_past_turning_point": bool,
    "window": int,
    "cadence_steps": float,
    "detector": str,
    "similarity": str,
    "components": list,
    "base_model": {"path", "matched", "total"},
    "findings": list,
    "skipped": list,
    "versions": dict,
}
"""Keys of verdict.json in the contract, with their types or their own keys."""


def rules(verdict: Verdict) -> set[str]:
    """Rules of all findings."""
    return {finding.rule for finding in verdict.findings}


def finding(verdict: Verdict, rule: str) -> Any:
    """The one finding of a rule."""
    (found,) = [entry for entry in verdict.findings if entry.rule == rule]
    return found


def strict_json(verdict: Verdict) -> dict[str, Any]:
    """verdict.json as a strict reader takes it: no NaN tokens."""
    document = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    assert isinstance(document, dict)
    return document


def of_status(status: Status) -> pl.DataFrame:
    """A run that has this status, and no claim to one that stands before it."""
    return {
        "unhealthy": layers_of({"a": [math.nan] * 30, "b": [math.nan] * 30}, delta_norm=0.0, nonfinite=0),
        "no_base_model": layers_of({"a": [None] * 30, "b": [None] * 30}, delta_norm=1.0, nonfinite=0),
        "too_few_checkpoints": layers_of({"a": wavy(8), "b": wavy(8)}, delta_norm=1.0, nonfinite=0),
        "no_second_valley": layers_of({"a": straight(30), "b": straight(30)}, delta_norm=1.0, nonfinite=0),
        "turning_point": layers_of({"a": wavy(60), "b": wavy(60)}, delta_norm=1.0, nonfinite=0),
    }[status]


STATUSES = pytest.mark.parametrize("status", get_args(Status))


def test_four_columns_are_enough() -> None:
    """`run, step, module, cosine` give a verdict with a turning point, named by its step."""
    verdict = lf.assess_run(layers_of({"a": wavy(60)}))
    assert verdict.run == "r"
    assert verdict.status == "turning_point"
    assert verdict.keep is not None
    assert verdict.turning_point is not None
    assert verdict.keep.rests_on == "turning_point"
    assert verdict.keep.step == verdict.turning_point.step == 10 * (verdict.turning_point.index + 1)
    assert verdict.keep.checkpoint == f"step {verdict.keep.step}"
    assert verdict.checkpoints == 60


def test_the_verdict_follows_the_series() -> None:
    """Window, index, step and end of the support are those of CS-Fluctuation on the mean of the modules."""
    first, second = noisy(60, 1), noisy(60, 2)
    verdict = lf.assess_run(layers_of({"a": first, "b": second}, every=20), checkpoints_of(60, every=20))
    assert verdict.window == 5
    found = lf.turning_point.valleys(lf.turning_point.cs_fluctuation(np.mean([first, second], axis=0), 5))
    turning = verdict.turning_point
    assert turning is not None
    assert turning.index == found[1]
    assert turning.step == 20 * (found[1] + 1)
    assert turning.checkpoint == f"c{turning.step}"
    assert turning.support_end_step == 20 * (found[1] + 3 * 5 - 1)
    assert verdict.evidence["valleys"] == [20 * (index + 1) for index in found]
    assert "100 steps" in verdict.window_reason


@pytest.mark.parametrize("missing", ["null", "absent"])
def test_every_other_column_may_be_null_or_absent(missing: str) -> None:
    """Columns without a value, typed or not, in both tables, change nothing against four columns alone."""
    layers = layers_of({"a": wavy(60), "b": noisy(60)})
    plain = lf.assess_run(layers)
    optional = {**schema(MODULE_COLUMNS), "cosine_rowwise": pl.Float64, "delta_norm": pl.Float64, "nonfinite": pl.Int64}
    needed = ("run", "step", "module", "cosine")
    checkpoints = layers.select("run", "step").unique()
    if missing == "null":
        untyped = {name: pl.lit(None) for name in optional if name not in needed}
        layers = layers.with_columns(**untyped)
        checkpoints = checkpoints.with_columns(
            **{name: pl.lit(None) for name in schema(CHECKPOINT_COLUMNS) if name not in needed}
        )
    assert lf.assess_run(layers, checkpoints) == plain
    assert lf.assess_run(layers, checkpoints.drop("run")) == plain
    assert lf.assess_run(layers, None) == plain
    assert lf.assess_run(layers, pl.DataFrame()) == plain


def test_narrow_types_are_widened() -> None:
    """Float32 cosines and 32-bit steps are read like wide ones."""
    layers = layers_of({"a": wavy(60)})
    narrow = layers.with_columns(pl.col("step").cast(pl.Int32), pl.col("cosine").cast(pl.Float32))
    wide = narrow.with_columns(pl.col("step").cast(pl.Int64), pl.col("cosine").cast(pl.Float64))
    checkpoints = checkpoints_of(60, learning_rate=1e-4).with_columns(pl.col("step").cast(pl.UInt16))
    assert lf.assess_run(narrow, checkpoints) == lf.assess_run(wide, checkpoints_of(60, learning_rate=1e-4))


@pytest.mark.parametrize("column", ["run", "step", "module", "cosine"])
def test_a_column_that_must_be_there_is_named(column: str) -> None:
    """Without one of the four there is no verdict, and the error says which."""
    with pytest.raises(SeriesError, match=column) as caught:
        lf.assess_run(layers_of({"a": wavy(60)}).drop(column))
    assert caught.value.hint


def test_a_table_of_several_runs_is_refused() -> None:
    """Two runs in one table are two calls; steps that stand twice among the checkpoints are not guessed at."""
    layers = layers_of({"a": wavy(60)})
    both = pl.concat([layers, layers.with_columns(run=pl.lit("s"))])
    with pytest.raises(SeriesError, match="several runs") as caught:
        lf.assess_run(both)
    assert "one" in caught.value.hint
    twice = pl.concat([checkpoints_of(60), checkpoints_of(60).with_columns(run=pl.lit("s"))])
    with pytest.raises(SeriesError) as caught:
        lf.assess_run(layers, twice)
    assert caught.value.hint


@pytest.mark.parametrize("column", ["step", "cosine", "delta_norm"])
def test_text_where_numbers_belong_is_refused(column: str) -> None:
    """A table whose column holds text is an error of the series, not one of polars."""
    layers = layers_of({"a": wavy(60)}).with_columns(**{column: pl.lit("many")})
    with pytest.raises(SeriesError, match=r"many|type") as caught:
        lf.assess_run(layers)
    assert caught.value.hint
    with pytest.raises(SeriesError):
        lf.assess_run(layers_of({"a": wavy(60)}), checkpoints_of(60, held_out_loss="low"))
    with pytest.raises(SeriesError, match="step"):
        lf.assess_run(layers_of({"a": wavy(60)}), checkpoints_of(60).drop("step"))


@pytest.mark.parametrize(
    "bad", [{"window": 1}, {"window": "one"}, {"detector": "x"}, {"similarity": "x"}, {"component": "unet"}]
)
def test_options_that_cannot_be_meant_are_refused(bad: dict[str, Any]) -> None:
    """The keywords of the call are checked like the options of the command."""
    layers = layers_of({"a": wavy(60)}, component="model")
    with pytest.raises(UsageError) as caught:
        lf.assess_run(layers, **bad)
    assert caught.value.hint


def test_component_may_be_one_name_or_several() -> None:
    """A string is one component, not its letters."""
    layers = layers_of({"a": wavy(60)}, component="model")
    assert lf.assess_run(layers, component="model") == lf.assess_run(layers, component=["model"])
    assert lf.assess_run(layers, component="all").components == ("model",)


@pytest.mark.parametrize(
    "layers",
    [pl.DataFrame(schema=schema(MODULE_COLUMNS) | {"cosine": pl.Float64}), layers_of({}), layers_of({"a": []})],
)
@pytest.mark.parametrize("checkpoints", [None, checkpoints_of(0), checkpoints_of(12)])
def test_an_empty_table_is_a_verdict(layers: pl.DataFrame, checkpoints: pl.DataFrame | None) -> None:
    """Nothing measured: too few checkpoints, and nothing to keep."""
    verdict = lf.assess_run(layers, checkpoints)
    assert verdict.status == "too_few_checkpoints"
    assert verdict.keep is None
    assert verdict.window is None
    strict_json(verdict)


def test_an_empty_table_with_held_out_losses_still_has_an_answer() -> None:
    """Losses need no measured layer."""
    verdict = lf.assess_run(layers_of({}), checkpoints_of(3, held_out_loss=[2.0, 1.0, 3.0]))
    assert verdict.keep is not None
    assert (verdict.keep.step, verdict.keep.rests_on) == (20, "held_out_loss")


@STATUSES
def test_every_status_has_its_run(status: Status) -> None:
    """Each status is reached; only a turning point gives something to keep without a held-out loss."""
    verdict = lf.assess_run(of_status(status))
    assert verdict.status == status
    assert (verdict.keep is not None) == (status == "turning_point")
    assert (verdict.turning_point is not None) == (status == "turning_point")
    assert (verdict.last_is_past_turning_point is not None) == (status == "turning_point")
    assert verdict.message
    assert [candidate.why for candidate in verdict.candidates] == (
        ["second valley"] if status == "turning_point" else []
    )


@pytest.mark.parametrize("unhealthy", [True, False])
@pytest.mark.parametrize("based", [True, False])
@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize("wave", [True, False])
def test_the_first_status_that_holds_is_given(unhealthy: bool, based: bool, many: bool, wave: bool) -> None:
    """unhealthy, no_base_model, too_few_checkpoints, no_second_valley, turning_point: in this order."""
    count = 60 if many else 8
    cosine: list[float | None] = list(wavy(count) if wave else straight(count))
    if not based:
        cosine = [None] * count
    verdict = lf.assess_run(layers_of({"a": cosine}, nonfinite=3 if unhealthy else 0, delta_norm=1.0))
    expected = next(
        name
        for holds, name in (
            (unhealthy, "unhealthy"),
            (not based, "no_base_model"),
            (not many, "too_few_checkpoints"),
            (not wave, "no_second_valley"),
            (True, "turning_point"),
        )
        if holds
    )
    assert verdict.status == expected
    assert (verdict.keep is None) == (expected != "turning_point")


@pytest.mark.parametrize(
    "columns",
    [
        {"nonfinite": 1},
        {"delta_norm": 0.0},
        {"delta_norm": math.nan},
        {"delta_norm": math.inf},
        {"delta_norm": 0.0, "cosine": None},
        {},
    ],
)
def test_zero_or_not_finite_throughout_is_unhealthy(columns: dict[str, Any]) -> None:
    """NaN, Inf or zero everywhere; with cosines alone, NaN everywhere says the same."""
    layers = layers_of({"a": [math.nan] * 12}).with_columns(**{name: pl.lit(v) for name, v in columns.items()})
    assert lf.assess_run(layers).status == "unhealthy"
    one_is_fine = layers.with_columns(
        nonfinite=pl.when(step=20).then(0), delta_norm=pl.when(step=20).then(1.0), cosine=pl.when(step=20).then(0.1)
    )
    assert lf.assess_run(one_is_fine).status == "too_few_checkpoints"


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("window", [2, 3, 4])
def test_a_turning_point_needs_3m_plus_3_checkpoints(detector: str, window: int) -> None:
    """One checkpoint less is too few whatever the series, and nothing is kept; from there on it may be enough."""
    reached = set()
    for seed in range(60):
        for count in (3 * window + 2, 3 * window + 3):
            layers = layers_of({"a": noisy(count, seed)})
            verdict = lf.assess_run(layers, window=window, detector=detector)
            assert (verdict.status == "too_few_checkpoints") == (count < 3 * window + 3)
            assert (verdict.keep is None) == (verdict.turning_point is None) == (verdict.status != "turning_point")
            reached.add(verdict.status)
    assert "turning_point" in reached or window > 2


@pytest.mark.parametrize("count", range(12))
def test_too_few_says_how_many_are_there_and_how_many_are_needed(count: int) -> None:
    """Below nine checkpoints the message counts them, says nine, and repeats the trainer's own setting."""
    verdict = assess(
        layers_of({"a": wavy(count)}), notes=RunNotes(save_more_often="set save_steps lower"), options=AssessOptions()
    ).verdict
    assert (verdict.status == "too_few_checkpoints") == (count < 9)
    assert (verdict.window is None) == (count < 9)
    if count < 9:
        assert verdict.message.startswith(f"{count} checkpoint")
        assert "9 or more" in verdict.message
        assert "set save_steps lower" in verdict.message


def test_checkpoints_without_a_common_module_are_not_asked_for_more() -> None:
    """Where no module has a cosine throughout, more checkpoints would not help, and the message says what is so."""
    cosines = [[math.nan if place == gap else 0.1 for place in range(12)] for gap in range(3)]
    for layers in (layers_of(dict(zip("abc", cosines, strict=True))), layers_of({})):
        verdict = lf.assess_run(layers, checkpoints_of(12))
        assert verdict.status == "too_few_checkpoints"
        assert "no module has a cosine throughout" in verdict.message


def test_too_few_for_the_window_asked_for_says_what_that_window_needs() -> None:
    """Twenty checkpoints and a window of ten: 33 are needed."""
    verdict = lf.assess_run(layers_of({"a": wavy(20)}), window=10)
    assert verdict.status == "too_few_checkpoints"
    assert verdict.window == 10
    assert "33" in verdict.message


@STATUSES
def test_held_out_loss_overrules_under_any_status(status: Status) -> None:
    """The lowest held-out loss is kept whatever the weights say; the status stays what it is."""
    layers = of_status(status)
    count = layers["step"].n_unique()
    losses = [abs(place - 4) + 1.0 for place in range(count)]
    verdict = lf.assess_run(layers, checkpoints_of(count, held_out_loss=losses, epoch=0.5))
    assert verdict.status == status
    assert verdict.keep is not None
    assert (verdict.keep.step, verdict.keep.checkpoint, verdict.keep.epoch) == (50, "c50", 0.5)
    assert verdict.keep.rests_on == "held_out_loss"
    held_out = verdict.evidence["held_out"]
    assert (held_out["step"], held_out["loss"], held_out["last_loss"]) == (50, 1.0, losses[-1])
    assert verdict.candidates[0].step == 50
    assert finding(verdict, "last-is-past").message.endswith("past the lowest held-out loss (step 50)")
    turning = verdict.turning_point
    assert held_out["at_turning_point"] == (losses[turning.index] if turning else None)


def test_of_equal_losses_the_first_is_kept() -> None:
    """The least trained of equals."""
    losses = [3.0, 1.0, 2.0, 1.0, 1.0]
    verdict = lf.assess_run(layers_of({"a": wavy(5)}), checkpoints_of(5, held_out_loss=losses).reverse())
    assert verdict.keep is not None
    assert verdict.keep.step == 20


@pytest.mark.parametrize("unknown", [math.nan, math.inf, -math.inf, None])
def test_a_loss_that_is_no_number_is_not_the_lowest(unknown: float | None) -> None:
    """NaN, infinities and nulls are skipped; where there is nothing else, the turning point decides."""
    losses = [unknown, 5.0, unknown, 4.0, *[unknown] * 56]
    layers = layers_of({"a": wavy(60)})
    verdict = lf.assess_run(layers, checkpoints_of(60, held_out_loss=losses))
    assert verdict.keep is not None
    assert (verdict.keep.step, verdict.keep.rests_on) == (40, "held_out_loss")
    assert verdict.evidence["held_out"]["last_loss"] == 4.0
    verdict = lf.assess_run(layers, checkpoints_of(60, held_out_loss=[unknown] * 60))
    assert verdict.keep is not None
    assert verdict.keep.rests_on == "turning_point"
    strict_json(verdict)


def test_a_broken_file_is_not_kept_while_there_is_a_whole_one() -> None:
    """A checkpoint that could not be read, or holds NaN, is passed over although its loss is the lowest."""
    losses = [5.0, 1.0, 4.0, 2.0, 3.0]
    layers = layers_of({"a": wavy(5), "b": wavy(5)}).with_columns(
        nonfinite=pl.when((pl.col("step") == 40) & (pl.col("module") == "b")).then(7).otherwise(0)
    )
    verdict = lf.assess_run(layers.filter(pl.col("step") != 20), checkpoints_of(5, held_out_loss=losses))
    assert verdict.keep is not None
    assert verdict.keep.step == 50


def test_whether_the_last_checkpoint_is_past_the_turning_point() -> None:
    """Training that went on is said so, with both steps."""
    verdict = lf.assess_run(layers_of({"a": wavy(60)}))
    assert verdict.turning_point is not None
    assert verdict.last_is_past_turning_point is True
    told = finding(verdict, "last-is-past")
    assert "step 600" in told.message
    assert f"step {verdict.turning_point.step}" in told.message


def test_a_turning_point_is_called_weak_evidence() -> None:
    """No confidence number: what is known about the rule is said, and where to look instead."""
    told = finding(lf.assess_run(layers_of({"a": wavy(60)})), "weak-evidence")
    assert "random walk" in told.message
    assert "below 30" not in told.hint
    told = finding(lf.assess_run(layers_of({"a": wavy(29)}), window=3), "weak-evidence")
    assert "below 30" in told.hint
    with_loss = lf.assess_run(layers_of({"a": wavy(60)}), checkpoints_of(60, held_out_loss=1.0))
    assert "weak-evidence" not in rules(with_loss)


def test_an_unknown_rate_is_a_finding() -> None:
    """One checkpoint without a rate: 1 throughout, and said so; with all rates there is nothing to say."""
    rates: list[float | None] = [1e-4] * 60
    assert "learning-rate-unknown" not in rules(
        lf.assess_run(layers_of({"a": wavy(60)}), checkpoints_of(60, learning_rate=rates))
    )
    rates[3] = None
    verdict = lf.assess_run(layers_of({"a": wavy(60)}), checkpoints_of(60, learning_rate=rates))
    told = finding(verdict, "learning-rate-unknown")
    assert told.severity == "info"
    assert "--learning-rate" in told.hint
    overruled = lf.assess_run(layers_of({"a": wavy(60)}), checkpoints_of(60, learning_rate=rates), learning_rate=1e-4)
    assert "learning-rate-unknown" not in rules(overruled)


def test_step_zero_is_dropped_and_said_in_passing() -> None:
    """`B = 0` at the first checkpoint is normal; the same later is an error."""
    layers = layers_of({"a": [math.nan, *wavy(60)], "b": [math.nan, *wavy(60)]})
    norms = pl.when(pl.col("cosine").is_nan()).then(0.0).otherwise(1.0)
    verdict = lf.assess_run(layers.with_columns(delta_norm=norms))
    assert verdict.status == "turning_point"
    assert verdict.turning_point is not None
    assert verdict.turning_point.step == 10 * (verdict.turning_point.index + 2)
    assert finding(verdict, "zero-change").severity == "info"
    assert "step 10" in finding(verdict, "checkpoint-undefined").message
    later = layers.with_columns(step=610 - pl.col("step")).with_columns(delta_norm=norms)
    assert finding(lf.assess_run(later), "zero-change").severity == "error"


def test_nan_in_weights_is_an_error_with_the_steps() -> None:
    """Non-finite tensors are told with how many modules and where."""
    layers = layers_of({"a": wavy(60), "b": wavy(60)}).with_columns(
        nonfinite=pl.when(pl.col("step") > 580).then(3).otherwise(0)
    )
    told = finding(lf.assess_run(layers), "nonfinite")
    assert told.severity == "error"
    assert "2 modules" in told.message
    assert "590, 600" in told.message


def test_uneven_distances_are_a_warning() -> None:
    """The window counts checkpoints: a gap in the steps is worth knowing."""
    layers = layers_of({"a": wavy(60)})
    assert "uneven-cadence" not in rules(lf.assess_run(layers))
    gap = layers.with_columns(step=pl.when(pl.col("step") > 300).then(pl.col("step") + 100).otherwise("step"))
    assert "110" in finding(lf.assess_run(gap), "uneven-cadence").message


@STATUSES
@pytest.mark.parametrize("losses", [True, False])
def test_verdict_json_has_the_keys_of_the_contract(status: Status, losses: bool) -> None:
    """Every key is there under every status, typed as promised or null, and strict JSON throughout."""
    layers = of_status(status)
    count = layers["step"].n_unique()
    checkpoints = checkpoints_of(count, held_out_loss=2.0) if losses else None
    document = strict_json(lf.assess_run(layers, checkpoints))
    for key, kind in PROMISED.items():
        value = document[key]
        if isinstance(kind, set):
            assert value is None or kind <= set(value), key
        else:
            assert value is None or isinstance(value, kind), key
    assert document["status"] == status
    assert document["schema"] == 1
    for entry in document["findings"]:
        assert set(entry) == {"rule", "severity", "message", "hint", "docs"}
        assert entry["severity"] in {"info", "warning", "error"}
    for entry in document["candidates"]:
        assert {"checkpoint", "step", "why"} <= set(entry)


def test_an_undefined_epoch_does_not_break_the_json() -> None:
    """NaN among the epochs is no JSON number: it becomes null."""
    verdict = lf.assess_run(layers_of({"a": wavy(60)}), checkpoints_of(60, epoch=math.nan, held_out_loss=1.0))
    document = strict_json(verdict)
    assert document["keep"]["epoch"] is None
    assert document["turning_point"]["epoch"] is None


@STATUSES
def test_a_verdict_comes_back_from_its_json(status: Status) -> None:
    """`from_dict` is the inverse of `to_dict`, through text; unknown keys of later versions are left out."""
    layers = of_status(status)
    notes = RunNotes(path="/runs/r", trainer="peft", skipped=(Skipped(Path("a/b.safetensors"), "truncated"),))
    verdict = assess(layers, checkpoints_of(layers["step"].n_unique(), held_out_loss=1.0), notes).verdict
    document = json.loads(json.dumps(verdict.to_dict())) | {"of a later version": 1}
    back = Verdict.from_dict(document)
    assert back.to_dict() == verdict.to_dict()
    assert (back.keep, back.turning_point, back.findings) == (verdict.keep, verdict.turning_point, verdict.findings)
    assert back.skipped == verdict.skipped


@pytest.mark.parametrize("broken", [{}, {"run": "r"}, {"keep": 3}, {"findings": [{"rule": "x"}]}, {"skipped": [{}]}])
def test_what_is_no_verdict_is_refused(broken: dict[str, Any]) -> None:
    """A document with a field missing or of another shape is an error that says what to do."""
    whole = lf.assess_run(of_status("turning_point")).to_dict()
    document = {**whole, **broken} if broken and "run" not in broken else broken
    with pytest.raises(SeriesError) as caught:
        Verdict.from_dict(document)
    assert caught.value.hint


def test_notes_of_the_run_are_in_the_verdict() -> None:
    """What the tables do not hold travels by the notes."""
    notes = RunNotes(path="/runs/r", trainer="peft", base_problem="no base model: looked in x")
    verdict = assess(of_status("no_base_model"), notes=notes).verdict
    assert (verdict.path, verdict.trainer, verdict.message) == ("/runs/r", "peft", "no base model: looked in x")


def test_the_base_model_is_counted_from_the_table() -> None:
    """Modules with a cosine somewhere have a base weight."""
    verdict = lf.assess_run(layers_of({"a": wavy(20), "b": [math.nan] * 20, "c": [None] * 20}))
    assert (verdict.base_model.matched, verdict.base_model.total) == (2, 3)


@given(st.randoms(use_true_random=False), st.booleans())
@settings(deadline=None, max_examples=25)
def test_the_order_of_rows_does_not_matter(random: Any, losses: bool) -> None:
    """Shuffled tables give the same verdict, up to the rounding of a sum."""
    layers = layers_of({name: noisy(40, seed) for seed, name in enumerate("abcd")}, component="unet", adapter="lora")
    checkpoints = checkpoints_of(40, held_out_loss=[float(v) for v in range(40, 0, -1)] if losses else None)
    order, places = list(range(len(layers))), list(range(40))
    random.shuffle(order)
    random.shuffle(places)
    shuffled = lf.assess_run(layers[order], checkpoints[places])
    assert shuffled == lf.assess_run(layers, checkpoints)


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_every_detector_and_similarity_gives_a_verdict(detector: str, similarity: str) -> None:
    """Contract over both tables: named in the verdict, never an exception, and a turning point that is a checkpoint."""
    for seed in range(10):
        layers = layers_of({"a": noisy(50, seed)}).with_columns(cosine_rowwise=pl.col("cosine") * 3)
        verdict = lf.assess_run(layers, checkpoints_of(50), detector=detector, similarity=similarity)
        assert (verdict.detector, verdict.similarity) == (detector, similarity)
        assert verdict.status in {"turning_point", "no_second_valley"}
        if verdict.turning_point:
            assert verdict.turning_point.checkpoint == f"c{verdict.turning_point.step}"
        strict_json(verdict)


def test_the_official_detector_reports_one_sample_after_a_valley() -> None:
    """Its turning point is the sample after the first or the second valley of the series."""
    for seed in range(30):
        found = assess(layers_of({"a": noisy(50, seed)}), options=AssessOptions(detector="official"))
        if found.verdict.turning_point:
            assert found.series["valley"][found.verdict.turning_point.index - 1] in (1, 2)


def test_assessing_never_reaches_torch(tmp_path: Path) -> None:
    """The reading half works where torch cannot be imported."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch is blocked')")
    code = (
        "import polars as pl, lora_forensics as lf; "
        "lf.assess_run(pl.DataFrame({'run': ['r'], 'step': [1], 'module': ['m'], 'cosine': [0.1]}))"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr


def test_the_same_tables_give_the_same_verdict_twice() -> None:
    """Nothing in a verdict depends on the time or the machine's mood: a second scan may compare documents."""
    layers = of_status("turning_point")
    verdict = lf.assess_run(layers)
    assert replace(verdict).to_dict() == lf.assess_run(layers.clone()).to_dict()


@pytest.mark.parametrize("detector", ["algorithm1", "official"])
def test_the_oracle_holds_through_a_whole_verdict(detector: str) -> None:
    """The 40 series as one module each: nothing between the table and the verdict moves a turning point."""
    import gzip
    import json
    from pathlib import Path

    cases = json.loads(gzip.decompress((Path(__file__).parent / "data" / "oracle" / "csf.json.gz").read_bytes()))
    for case in cases:
        rate = case["learning_rate"]
        options = {"learning_rate": rate} if isinstance(rate, float) else {}
        verdict = lf.assess_run(layers_of({"a": case["cosine"]}), window=case["window"], detector=detector, **options)
        known = case["official"]["reported"] if detector == "official" and case["official"] else case["algorithm1"]
        if len(case["cosine"]) >= 3 * case["window"] + 3:
            expected = None if case[detector] is None else known
            assert (verdict.turning_point and verdict.turning_point.index) == expected


def moving(count: int, moved: list[float], cosine: list[float] | None = None) -> pl.DataFrame:
    """A layers table of one module that moves so far before each checkpoint."""
    layers = layers_of({"a": cosine or wavy(count)}, nonfinite=0, delta_norm=moved[0])
    return layers.with_columns(pl.Series("step_size", [math.nan, *moved[1:]]))


def test_the_default_keeps_half_of_the_way() -> None:
    """Movement decides; the turning point is beside it, and is kept when its detector is asked for by name."""
    layers = moving(40, [1.0] * 20 + [3.0] * 20)
    verdict = lf.assess_run(layers)
    assert verdict.detector == "half_path"
    assert verdict.status == "turning_point"
    assert verdict.keep is not None
    assert (verdict.keep.rests_on, verdict.keep.step) == ("weights", 270), "1 x 20 + 3 x 7 of 80"
    assert verdict.turning_point is not None
    assert "weak-evidence" in {finding.rule for finding in verdict.findings}
    by_paper = lf.assess_run(layers, detector="algorithm1")
    assert by_paper.keep is not None
    assert by_paper.turning_point == verdict.turning_point
    assert (by_paper.keep.rests_on, by_paper.keep.step) == ("turning_point", verdict.turning_point.step)


def test_without_a_second_valley_the_weights_still_decide() -> None:
    """No valley is claimed, and the paper's detector keeps nothing."""
    layers = moving(30, [1.0] * 30, straight(30))
    verdict = lf.assess_run(layers)
    assert (verdict.status, verdict.turning_point) == ("no_second_valley", None)
    assert verdict.keep is not None
    assert (verdict.keep.rests_on, verdict.keep.step) == ("weights", 150)
    assert lf.assess_run(layers, detector="algorithm1").keep is None


def test_held_out_loss_overrules_the_weights() -> None:
    """As it overrules everything."""
    losses = [2.0 - 0.01 * place for place in range(40)]
    verdict = lf.assess_run(moving(40, [1.0] * 40), checkpoints_of(40, held_out_loss=losses))
    assert verdict.keep is not None
    assert (verdict.keep.rests_on, verdict.keep.step) == ("held_out_loss", 400)


def test_too_few_checkpoints_name_what_to_compare() -> None:
    """Six epochs: nothing is kept, and two or three files are named with what tests say of them."""
    verdict = lf.assess_run(moving(6, [5.0, 5.0, 1.0, 1.0, 1.0, 1.0]), checkpoints_of(6))
    assert (verdict.status, verdict.keep) == ("too_few_checkpoints", None)
    found = [(candidate.step, candidate.why) for candidate in verdict.candidates]
    assert found == [(20, "half of the way"), (30, "the middle"), (60, "the last")]
    assert "few-checkpoints" in {finding.rule for finding in verdict.findings}
    alone = lf.assess_run(moving(1, [5.0]), checkpoints_of(1))
    assert (alone.keep, alone.candidates) == (None, ())
    assert "few-checkpoints" not in {finding.rule for finding in alone.findings}


@pytest.mark.parametrize("first", [110, 200])
def test_a_run_that_broke_for_good_keeps_half_of_the_way_until_then(first: int) -> None:
    """NaN from a step on, be that most of the run: the way ends at the last whole file."""
    gone = pl.col("step") >= first
    layers = moving(30, [1.0] * 30, straight(30)).with_columns(
        nonfinite=pl.when(gone).then(1).otherwise(0),
        **{name: pl.when(gone).then(math.nan).otherwise(name) for name in ("step_size", "delta_norm", "cosine")},
    )
    verdict = lf.assess_run(layers, checkpoints_of(30))
    half = {110: 50, 200: 100}[first]
    assert verdict.keep is not None
    assert (verdict.keep.rests_on, verdict.keep.step) == ("weights", half)
    assert [(candidate.step, candidate.why) for candidate in verdict.candidates] == [
        (half, "half of the way"),
        (first - 10, "the last whole file"),
    ]


def test_broken_files_are_no_candidates() -> None:
    """Half of the way and the last fall back to the whole file before them."""
    layers = moving(30, [1.0] * 30, straight(30))
    broken = layers.with_columns(
        nonfinite=pl.when(pl.col("step").is_in([150, 300])).then(1).otherwise(0),
        step_size=pl.when(pl.col("step").is_in([150, 300])).then(math.nan).otherwise("step_size"),
    )
    verdict = lf.assess_run(broken, checkpoints_of(30))
    assert verdict.keep is not None
    assert verdict.keep.step == 140
    assert [(candidate.step, candidate.why) for candidate in verdict.candidates] == [
        (140, "half of the way"),
        (290, "the last whole file"),
    ]
