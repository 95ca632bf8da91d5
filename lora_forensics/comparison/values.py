"""The values of a comparison, and what is the same at the same place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np
import polars as pl

from lora_forensics.records import SCHEMA, Skipped, Verdict

ALIGN = ("step", "epoch", "dose")
"""What may lie along the axis."""

MEASURES = {
    "cosine": "cosine similarity (CS)",
    "cs_fluctuation": "CS-Fluctuation",
    "held_out_loss": "held-out loss",
    "train_loss": "training loss",
    "path_length": "way that the weights moved",
    "mean_relative_norm": "size of the change, relative to the weights",
    "mean_effective_rank": "effective rank of the change",
}
"""Column that may be compared along the axis, to what it is."""

_PLACES = 6
"""Places along the axis at which the table shows all runs."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One run."""

    name: str
    verdict: Verdict
    settings: dict[str, str]
    """What it was trained with."""
    results: dict[str, str]
    """What came of it."""
    course: pl.DataFrame
    """`ALIGN`, `MEASURES` and `place` (what the verdict calls its step), a row per checkpoint; null where unknown."""
    report: Path | None = None
    """The run's own page; None where there is none, or where nobody may see where it lies."""

    def kept(self) -> dict[str, Any]:
        """The row of the course at the checkpoint to keep; empty where nothing is kept."""
        keep = self.verdict.keep
        here = self.course.filter(pl.col("place") == keep.step) if keep else self.course.clear()
        return here.row(0, named=True) if len(here) else {}


@dataclass(frozen=True, slots=True)
class Comparison:
    """All runs, in the order in which they were named."""

    runs: tuple[Compared, ...]
    align: str
    measures: tuple[str, ...]
    """Those that at least one run has along the axis."""
    notes: dict[str, str] = field(default_factory=dict)
    """Measure to how far its values can be compared between these runs."""
    left_out: tuple[Skipped, ...] = ()
    """What could not be compared, and why."""

    def differing(self) -> dict[str, list[str]]:
        """Settings that are known to differ, one value a run; '?' where unknown."""
        return {name: values for name, values in self.settings().items() if len(set(values) - {"?"}) > 1}

    def partly(self) -> dict[str, list[str]]:
        """Settings that only some runs tell, all of them the same: whether they differ is not known."""
        return {name: values for name, values in self.settings().items() if "?" in values and len(set(values)) == 2}

    def same(self) -> dict[str, str]:
        """Settings that all runs share."""
        return {name: values[0] for name, values in self.settings().items() if len(set(values)) == 1}

    def settings(self) -> dict[str, list[str]]:
        """All settings, one value a run; '?' where unknown."""
        names = dict.fromkeys(name for run in self.runs for name in run.settings)
        return {name: [run.settings.get(name, "?") for run in self.runs] for name in names}

    def results(self) -> dict[str, list[str]]:
        """What came of each run."""
        names = dict.fromkeys(name for run in self.runs for name in run.results)
        return {name: [run.results.get(name, "-") for run in self.runs] for name in names}

    def places(self) -> list[float]:
        """Places along the axis that runs share, from the latest start to the earliest end.

        A run that ends before half of what is usual here (unfinished, or of a small rate) does not end the others.
        """
        axes = [run.course[self.align].drop_nulls().to_list() for run in self.runs]
        spans = [(min(axis), max(axis)) for axis in axes if axis]
        if not spans:
            return []
        usual = median_low(high for _, high in spans)
        spans = [(low, high) for low, high in spans if high >= usual / 2]
        low, high = max(low for low, _ in spans), min(high for _, high in spans)
        if low >= high:
            return [low] if low == high else []
        width = (high - low) / (_PLACES - 1)
        return [low + width * place for place in range(_PLACES)]

    def without(self) -> list[int]:
        """Places of the runs of which nothing is known along the axis."""
        return [place for place, run in enumerate(self.runs) if run.course[self.align].is_null().all()]

    def at(self, run: Compared, measure: str, place: float) -> float | None:
        """The value at the checkpoint that lies nearest to a place on the axis; None where none lies near."""
        axis, values = (run.course[name].to_numpy() for name in (self.align, measure))  # NaN where unknown
        away = np.where(np.isfinite(values), np.abs(axis - place), np.nan)
        if np.isnan(away).all():
            return None
        nearest, gaps = np.nanargmin(away), np.diff(np.sort(axis[np.isfinite(axis)]))
        far = away[nearest] > (np.median(gaps) if gaps.size else 1e-9 * max(1.0, abs(place)))
        return None if far else float(values[nearest])

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready form."""
        return {
            "schema": SCHEMA,
            "align": self.align,
            "runs": [
                {
                    "name": run.name,
                    "settings": run.settings,
                    "results": run.results,
                    "keep": run.verdict.to_dict()["keep"],
                    "status": run.verdict.status,
                    "findings": [finding.to_dict() for finding in run.verdict.findings],
                    "course": run.course.select(*ALIGN, *self.measures).to_dicts(),
                }
                for run in self.runs
            ],
            "differing": sorted(self.differing()),
            "partly_known": sorted(self.partly()),
            "notes": self.notes,
            "left_out": [entry.to_dict() for entry in self.left_out],
            "table": {
                measure: [
                    {"at": place, "values": [self.at(run, measure, place) for run in self.runs]}
                    for place in self.places()
                ]
                for measure in self.measures
            },
        }


def values_of(measure: str, runs: Sequence[Compared]) -> list[float]:
    """All values of a measure that are numbers."""
    return [value for run in runs for value in run.course[measure].drop_nulls() if isfinite(value)]
