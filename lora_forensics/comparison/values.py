"""The values of a comparison, and what is the same at the same place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import polars as pl

from lora_forensics.records import SCHEMA, Verdict

ALIGN = ("step", "epoch", "dose")
"""What may lie along the axis."""

MEASURES = {
    "cosine": "cosine similarity (CS)",
    "held_out_loss": "held-out loss",
    "train_loss": "training loss",
    "path_length": "way that the weights moved",
    "mean_relative_norm": "size of the change, relative to the weights",
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
    """`ALIGN` and `MEASURES`, a row per checkpoint; null where unknown."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All runs, in the order in which they were named."""

    runs: tuple[Compared, ...]
    align: str
    measures: tuple[str, ...]
    """Those that at least one run has along the axis."""

    def differing(self) -> dict[str, list[str]]:
        """Settings that are not the same for all, one value a run; '?' where unknown."""
        return {name: values for name, values in self._settings().items() if len(set(values)) > 1}

    def same(self) -> dict[str, str]:
        """Settings that all runs share."""
        return {name: values[0] for name, values in self._settings().items() if len(set(values)) == 1}

    def _settings(self) -> dict[str, list[str]]:
        names = dict.fromkeys(name for run in self.runs for name in run.settings)
        return {name: [run.settings.get(name, "?") for run in self.runs] for name in names}

    def results(self) -> dict[str, list[str]]:
        """What came of each run."""
        names = dict.fromkeys(name for run in self.runs for name in run.results)
        return {name: [run.results.get(name, "-") for run in self.runs] for name in names}

    def places(self) -> list[float]:
        """Places along the axis that all runs reach, from the latest start to the earliest end."""
        axes = [run.course[self.align].drop_nulls() for run in self.runs]
        axes = [axis for axis in axes if len(axis)]
        if not axes:
            return []
        low, high = max(float(axis.min()) for axis in axes), min(float(axis.max()) for axis in axes)  # type: ignore[arg-type]
        if low >= high:
            return [low] if low == high else []
        width = (high - low) / (_PLACES - 1)
        return [low + width * place for place in range(_PLACES)]

    def at(self, run: Compared, measure: str, place: float) -> float | None:
        """The value at the checkpoint that lies nearest to a place on the axis; None where none lies near."""
        known = run.course.filter(pl.col(self.align).is_not_null())
        if known.is_empty():
            return None
        nearest = known.sort((pl.col(self.align) - place).abs()).row(0, named=True)
        axis = known[self.align].sort()
        cadence = axis.diff().median()
        far = abs(nearest[self.align] - place) > (cadence if isinstance(cadence, float) else math.inf)
        value = nearest[measure]
        return None if far or value is None or not math.isfinite(value) else float(value)

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
                    "course": run.course.select(*ALIGN, *self.measures).to_dicts(),
                }
                for run in self.runs
            ],
            "differing": sorted(self.differing()),
            "table": {
                measure: [
                    {"at": place, "values": [self.at(run, measure, place) for run in self.runs]}
                    for place in self.places()
                ]
                for measure in self.measures
            },
        }
