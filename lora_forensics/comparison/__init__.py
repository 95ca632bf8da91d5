"""Runs side by side: their settings, their verdicts, and their courses at the same step, epoch or dose.

Read from the tables of scans alone; `text` and `figure` render what `compare_runs` gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from lora_forensics.comparison.values import ALIGN, MEASURES, Compared, Comparison
from lora_forensics.errors import SeriesError, UsageError
from lora_forensics.records import RunNotes, Summary, Verdict
from lora_forensics.redaction import Redaction, redacted
from lora_forensics.reports.text import RESTS_ON, STATUS, number
from lora_forensics.scan import load_summary
from lora_forensics.series import read_table
from lora_forensics.store import load_measured, stored_verdict

__all__ = ["ALIGN", "MEASURES", "Compared", "Comparison", "compare_runs"]


def compare_runs(outs: Sequence[Path], align: str = "step", redact: bool = False) -> Comparison:
    """All runs of the folders of scans, or of single runs in them (OUT/RUN).

    Raises:
        SeriesError: a folder is no output of a scan.
        UsageError: there is one run only.
    """
    found = [entry for out in outs for entry in _runs(out)]
    if len(found) < 2:
        raise UsageError(f"{len(found)} run is not enough to compare", "name another folder of a scan, or OUT/RUN")
    places = {str(folder): (folder, verdict) for folder, verdict in found}
    names = _names([verdict.run for _, verdict in places.values()], list(places))
    runs = tuple(_compared(name, *entry, redact) for name, entry in zip(names, places.values(), strict=True))
    along = [run.course.filter(pl.col(align).is_not_null()) for run in runs]
    known = tuple(name for name in MEASURES if any(course[name].is_finite().any() for course in along))
    return Comparison(runs, align, known)


def _runs(out: Path) -> list[tuple[Path, Verdict]]:
    if not (out / "summary.json").exists() and (verdict := stored_verdict(out)) is not None:
        return [(out, verdict)]
    return [(out / verdict.run, verdict) for verdict in load_summary(out).runs]


def _names(runs: list[str], folders: list[str]) -> list[str]:
    """The runs' names; their folders' where names are not enough."""
    return [folder if runs.count(run) > 1 else run for run, folder in zip(runs, folders, strict=True)]


def _compared(name: str, folder: Path, verdict: Verdict, redact: bool) -> Compared:
    stored = load_measured(folder)
    if stored is None:
        raise SeriesError(f"{folder}: its tables are missing or damaged", "scan again")
    series = read_table(folder / "series.parquet")
    if redact:
        summary = Summary((verdict,))
        name, verdict = Redaction(summary).run(name), redacted(summary).runs[0]
    course = _course(series, stored.checkpoints)
    settings = _settings(verdict, stored.notes, stored.checkpoints, stored.layers)
    if redact:
        hidden = Redaction(Summary((verdict,)))
        settings = {label: hidden.text(value) for label, value in settings.items()}
    return Compared(name, verdict, settings, _results(verdict, stored.checkpoints, course), course)


def _course(series: pl.DataFrame, checkpoints: pl.DataFrame) -> pl.DataFrame:
    own = [name for name in MEASURES if name in series.columns]
    known = checkpoints.select("step", "epoch", "dose", "held_out_loss", "train_loss")
    joined = known.join(series.select("step", *own).unique("step"), on="step", how="left").sort("step")
    lost = [pl.lit(None, pl.Float64).alias(name) for name in MEASURES if name not in joined.columns]
    return joined.with_columns(*lost).select(pl.col(*ALIGN, *MEASURES).cast(pl.Float64))


def _settings(verdict: Verdict, notes: RunNotes, checkpoints: pl.DataFrame, layers: pl.DataFrame) -> dict[str, str]:
    def first(name: str) -> Any:
        return next(iter(checkpoints[name].drop_nulls()), None)

    rates = checkpoints["learning_rate"].drop_nulls()
    scales = sorted(set(layers["scale"].drop_nulls().round(6)))
    found = {
        "trainer": verdict.trainer or "?",
        "adapter": verdict.adapter or "?",
        "scale": " to ".join(dict.fromkeys(number(scale, 3) for scale in (scales[:1] + scales[-1:]))) or "?",
        "modules": str(verdict.base_model.total or "?"),
        "base": _base(verdict),
        "samples": number(first("train_samples")),
        "batch size": number(first("batch_size")),
        "steps an epoch": number(first("steps_per_epoch")),
        "learning rate": number(rates.max(), 3),
        "last rate": number(rates[-1] if len(rates) else None, 3),
        "stored as": str(first("dtype") or "?"),
    }
    return {**notes.settings, **found}


def _base(verdict: Verdict) -> str:
    path = (verdict.base_model.path or "?").rstrip("/").replace("\\", "/")
    return path.rpartition("/")[2] or path


def _results(verdict: Verdict, checkpoints: pl.DataFrame, course: pl.DataFrame) -> dict[str, str]:
    keep, point, unit = verdict.keep, verdict.turning_point, verdict.step_unit
    losses = checkpoints.filter(pl.col("held_out_loss").is_finite()).sort("held_out_loss")
    best = losses.row(0, named=True) if len(losses) else None

    def end(name: str) -> str:
        known = course[name].drop_nulls()
        return number(known[-1], 3) if len(known) else "?"

    steps = checkpoints["step"].to_list()
    return {
        "checkpoints": f"{len(checkpoints)}, {unit}s {min(steps)}-{max(steps)}" if steps else "0",
        "verdict": STATUS.get(verdict.status, verdict.status),
        "keep": f"{unit} {keep.step}" if keep else "no answer",
        "rests on": RESTS_ON.get(keep.rests_on, keep.rests_on) if keep else "-",
        "turning point": f"{unit} {point.step}" if point else "-",
        "best held-out": f"{number(best['held_out_loss'])} at {best['step']}" if best else "-",
        "path length": end("path_length"),
        "dose": end("dose"),
        "findings": ", ".join(f"{n} {s}" for s in ("error", "warning", "info") if (n := _many(verdict, s))) or "none",
    }


def _many(verdict: Verdict, severity: str) -> int:
    return sum(finding.severity == severity for finding in verdict.findings)
