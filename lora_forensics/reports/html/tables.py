"""The tables of one run, as far as they can be read, and what their columns mean."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from lora_forensics.errors import SeriesError
from lora_forensics.redaction import Redaction
from lora_forensics.series import MODULE_COLUMNS, read_notes, read_table

_TABLES = ("layers", "checkpoints", "series", "modules")
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_PLACES = frozenset(column.name for column in MODULE_COLUMNS)


@dataclass(frozen=True, slots=True)
class RunTables:
    """The Parquet files of one run; an empty frame for one that is missing or damaged."""

    layers: pl.DataFrame = field(default_factory=pl.DataFrame)
    checkpoints: pl.DataFrame = field(default_factory=pl.DataFrame)
    series: pl.DataFrame = field(default_factory=pl.DataFrame)
    modules: pl.DataFrame = field(default_factory=pl.DataFrame)
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Description of each column of layers.parquet, as the file itself has it."""

    @classmethod
    def read(cls, folder: Path) -> RunTables:
        """What lies in a run's folder of OUT."""
        frames = {name: _frame(folder / f"{name}.parquet") for name in _TABLES}
        try:
            described = json.loads(read_notes(folder / "layers.parquet").get("lora_forensics.columns", "{}"))
        except ValueError:
            described = {}
        return cls(**frames, columns=described if isinstance(described, dict) else {})

    def renamed(self, hidden: Redaction, unit: str) -> RunTables:
        """With the labels of checkpoints in place of their names."""

        def labelled(frame: pl.DataFrame) -> pl.DataFrame:
            if not {"checkpoint", "step"} <= set(frame.columns):
                return frame
            pairs = frame.select("checkpoint", "step").unique().rows()
            names = {(name, step): hidden.checkpoint(name, step, unit) for name, step in pairs if name is not None}
            told = [names.get(pair) for pair in frame.select("checkpoint", "step").iter_rows()]
            return frame.with_columns(pl.Series("checkpoint", told, pl.String))

        frames = {name: labelled(getattr(self, name)) for name in _TABLES}
        return RunTables(**frames, columns=self.columns)

    def metrics(self) -> list[str]:
        """Columns of layers.parquet that hold a finite number somewhere, in the file's order."""
        return [
            name
            for name, dtype in self.layers.schema.items()
            if dtype == pl.Float64 and _NAME.fullmatch(name) and name not in _PLACES and _known(self.layers[name])
        ]

    def meaning(self, name: str) -> str:
        """What a column means, in words."""
        described = self.columns.get(name)
        return str(described.get("meaning", "")) if isinstance(described, dict) else ""


def _frame(path: Path) -> pl.DataFrame:
    try:
        return read_table(path)
    except SeriesError:
        return pl.DataFrame()


def _known(values: pl.Series) -> bool:
    return bool(values.is_finite().any())
