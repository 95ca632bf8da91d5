"""Runs side by side: their settings, their verdicts, and their courses at the same step, epoch or dose.

Read from the tables of scans alone; `text` and `figure` render what `compare_runs` gives.
"""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from lora_forensics.comparison import comparable
from lora_forensics.comparison.values import ALIGN, MEASURES, Compared, Comparison
from lora_forensics.errors import SeriesError, UsageError
from lora_forensics.records import RunNotes, Skipped, Summary, Verdict
from lora_forensics.redaction import Redaction, label, redacted
from lora_forensics.reports.terminal import FINDING_LABELS
from lora_forensics.reports.text import RESTS_ON, STATUS, count, number
from lora_forensics.scan import load_summary
from lora_forensics.series import CHECKPOINT_COLUMNS, MODULE_COLUMNS, Column, read_table
from lora_forensics.store import load_measured, stored_verdict
from lora_forensics.tables import Measured

EVIDENCE = {
    "probe": "strong: scored on what was asked for",
    "held_out_loss": "strong: measured on held-out data",
    "turning_point": "weak: weights alone, a random walk has valleys, too",
    "weights": "weak: weights alone, not shown to beat the middle checkpoint",
}
"""What the answer rests on, to how far that goes (docs/method.md)."""

__all__ = ["ALIGN", "EVIDENCE", "MEASURES", "Compared", "Comparison", "compare_runs"]


def compare_runs(outs: Sequence[Path], align: str = "step", redact: bool = False) -> Comparison:
    """All runs of the folders of scans, or of single runs in them (OUT/RUN).

    A run whose tables are lost is left out, with the reason.

    Raises:
        SeriesError: a folder is no output of a scan.
        UsageError: there are not two runs that can be compared.
    """
    places: dict[str, tuple[Path, Verdict]] = {}
    lost: list[Skipped] = []
    for out in outs:
        found, skipped = _runs(out)
        lost += skipped
        for folder, verdict in found:
            places.setdefault(os.path.realpath(folder), (folder, verdict))
    read: list[tuple[Path, Verdict, Measured, pl.DataFrame]] = []
    for folder, verdict in places.values():
        tables = _tables(folder)
        if isinstance(tables, str):
            lost.append(Skipped(folder, tables))
        else:
            read.append((folder, verdict, *tables))
    if len(read) < 2:
        reasons = "".join(f"; {entry.path}: {entry.reason}" for entry in lost[:3])
        message = f"{count(len(read), 'run')} {'is' if len(read) == 1 else 'are'} not enough to compare{reasons}"
        raise UsageError(message, "name another folder of a scan, or OUT/RUN")
    names = _names([verdict.run for _, verdict, _, _ in read], [str(folder) for folder, _, _, _ in read])
    bases = _bases([(verdict, stored.notes) for _, verdict, stored, _ in read], redact)
    runs = tuple(
        _compared(name, base, *entry, redact=redact) for name, base, entry in zip(names, bases, read, strict=True)
    )
    if redact:
        hidden = Redaction(Summary(tuple(verdict for _, verdict, _, _ in read), tuple(lost)))
        lost = [hidden.skipped(entry) for entry in lost]
    along = [run.course.filter(pl.col(align).is_not_null()) for run in runs]
    known = tuple(name for name in MEASURES if any(course[name].is_finite().any() for course in along))
    return Comparison(runs, align, known, comparable.notes(runs), tuple(lost))


def _runs(out: Path) -> tuple[list[tuple[Path, Verdict]], list[Skipped]]:
    """Runs with their folders, and what the scan could not read."""
    if not (out / "summary.json").exists() and (verdict := stored_verdict(out)) is not None:
        return [(out, verdict)], []
    summary = load_summary(out)
    inside = out.resolve()
    for verdict in summary.runs:
        if not (out / verdict.run).resolve().is_relative_to(inside):
            raise SeriesError(f"{out}/summary.json names a run outside of its folder: {verdict.run}", "scan again")
    return [(out / verdict.run, verdict) for verdict in summary.runs], [s for s in summary.skipped if not s.expected]


def _tables(folder: Path) -> tuple[Measured, pl.DataFrame] | str:
    """What was measured and the series, or why they cannot be read."""
    stored = load_measured(folder)
    if stored is None:
        return "its tables are missing or damaged: scan again"
    path = folder / "series.parquet"
    layers, checkpoints = _whole(stored.layers, MODULE_COLUMNS), _whole(stored.checkpoints, CHECKPOINT_COLUMNS)
    try:
        return replace(stored, layers=layers, checkpoints=checkpoints), read_table(path)
    except SeriesError as error:
        return Skipped.because(path, error).reason


def _whole(table: pl.DataFrame, columns: Sequence[Column]) -> pl.DataFrame:
    """With every column that this version reads; a table of another one may lack some."""
    return table.with_columns(pl.lit(None, c.polars).alias(c.name) for c in columns if c.name not in table.columns)


def _names(runs: list[str], folders: list[str]) -> list[str]:
    """The runs' names; their folders' where names are not enough."""
    return [folder if runs.count(run) > 1 else run for run, folder in zip(runs, folders, strict=True)]


def _bases(read: Sequence[tuple[Verdict, RunNotes]], redact: bool) -> list[str]:
    """The base models' names; where they lie if one name stands for several; labels where nobody may see them."""
    named: list[tuple[str, str]] = []
    for verdict, known in read:
        path = (verdict.base_model.path or "?").rstrip("/").replace("\\", "/")
        place = posixpath.normpath(next(iter(known.base_files), path).replace("\\", "/")) if path != "?" else path
        named.append((label("base", verdict.base_model.path or "") if redact else path.rpartition("/")[2], place))
    if redact:
        first = {place: name for name, place in reversed(named)}
        return [place if place == "?" else first[place] for _, place in named]
    several = Counter(name for name, _ in dict.fromkeys(named))
    return [place if several[name] > 1 else name or place for name, place in named]


def _compared(
    name: str, base: str, folder: Path, verdict: Verdict, stored: Measured, series: pl.DataFrame, *, redact: bool
) -> Compared:
    page = folder / "report.html"
    report = page if not redact and page.exists() else None
    settings = {**_settings(verdict, stored.notes, stored.checkpoints, stored.layers), "base": base}
    if redact:
        summary = Summary((verdict,))
        hidden = Redaction(summary)
        settings = {label: hidden.text(value) for label, value in settings.items()}
        name, verdict = hidden.run(name), redacted(summary).runs[0]
        settings["base"] = base
    course = _course(series, stored.checkpoints, verdict.step_unit)
    return Compared(name, verdict, settings, _results(verdict, stored.checkpoints, course), course, report)


def _course(series: pl.DataFrame, checkpoints: pl.DataFrame, unit: str) -> pl.DataFrame:
    """A row per checkpoint, and per step to which its series was interpolated."""
    own = [name for name in MEASURES if name in series.columns]
    saved = checkpoints.select("step", "epoch", "dose", "held_out_loss", "train_loss")
    joined = saved.join(series.select("step", *own).unique("step"), on="step", how="full", coalesce=True).sort("step")
    between = pl.col("epoch", "dose").interpolate_by("step")
    lost = [pl.lit(None, pl.Float64).alias(name) for name in MEASURES if name not in joined.columns]
    joined = joined.with_columns(pl.col("step").alias("place"), between, *lost)
    if unit != "step":  # its numbers are epochs: no place beside another run's steps
        epochs = pl.col("epoch").fill_null(pl.col("step")) if unit == "epoch" else pl.col("epoch")
        joined = joined.with_columns(epochs, pl.lit(None).alias("step"))
    known = pl.col(*ALIGN, *MEASURES).cast(pl.Float64)
    return joined.select("place", pl.when(known.is_finite()).then(known))


def _settings(verdict: Verdict, notes: RunNotes, checkpoints: pl.DataFrame, layers: pl.DataFrame) -> dict[str, str]:
    def first(name: str) -> Any:
        return next(iter(checkpoints[name].drop_nulls()), None)

    rates = checkpoints["learning_rate"].drop_nulls()
    scales = sorted(set(layers["scale"].drop_nulls().round(6)))
    epoch, batch, samples = first("steps_per_epoch"), first("batch_size"), first("train_samples")
    found = {
        "trainer": verdict.trainer or "?",
        "adapter": verdict.adapter or "?",
        "scale": " to ".join(dict.fromkeys(number(scale, 3) for scale in (scales[:1] + scales[-1:]))) or "?",
        "modules": str(verdict.base_model.total or "?"),
        "base": "?",
        "highest rate": number(rates.max(), 3),
        "last rate": number(rates[-1] if len(rates) else None, 3),
        "samples": f"about {epoch * batch:.4g}" if samples is None and epoch and batch else number(samples),
        "batch size": number(batch),
        "steps an epoch": number(epoch),
        "stored as": str(first("dtype") or "?"),
        "window": number(verdict.window),
        "similarity": verdict.similarity,
        "scope": ", ".join(verdict.components) or "?",
    }
    return found | {label: value for label, value in notes.settings.items() if found.get(label, "?") == "?"}


def _results(verdict: Verdict, checkpoints: pl.DataFrame, course: pl.DataFrame) -> dict[str, str]:
    keep, point, unit = verdict.keep, verdict.turning_point, verdict.step_unit
    probe = verdict.evidence.get("probe")
    score = probe.get("score") if isinstance(probe, dict) else None
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
        "evidence": EVIDENCE.get(keep.rests_on, "?") if keep else "none",
        "probe": number(score) if score is not None else "-",
        "turning point": f"{unit} {point.step}" if point else "-",
        "best held-out": f"{number(best['held_out_loss'])} at {unit} {best['step']}" if best else "-",
        "path length": end("path_length"),
        "dose": end("dose"),
        "findings": ", ".join(count(n, said) for s, said in FINDING_LABELS.items() if (n := _many(verdict, s)))
        or "none",
    }


def _many(verdict: Verdict, severity: str) -> int:
    return sum(finding.severity == severity for finding in verdict.findings)
