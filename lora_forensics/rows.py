"""Rows of a scan's Parquet files, for other programs."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl

from lora_forensics.errors import SeriesError, UsageError
from lora_forensics.reports import to_json
from lora_forensics.reports.text import plain
from lora_forensics.series import read_table

_FORMULA = ("=", "+", "-", "@")
"""How a text begins that a spreadsheet computes."""


def rows(out: Path, name: str, columns: tuple[str, ...] = (), where: str | None = None) -> pl.DataFrame:
    """A table of one run or of all runs of a scan.

    Raises:
        SeriesError: there is no such table, or it cannot be read.
        UsageError: no such column, or a condition that is none.
    """
    paths = sorted(out.rglob(f"{name}.parquet"))
    if not paths:
        raise SeriesError(f"{out} holds no {name}.parquet", "give the folder that a scan wrote with --out")
    found = pl.concat([read_table(path) for path in paths], how="diagonal_relaxed")
    try:
        found = found.filter(pl.sql_expr(where)) if where else found
    except (pl.exceptions.PolarsError, TypeError) as error:
        hint = f"name columns and values, as in --where 'step >= 100'; columns: {', '.join(found.columns)}"
        raise UsageError(f"--where {where!r}: {str(error).splitlines()[0]}", hint) from error
    if missing := [column for column in columns if column not in found.columns]:
        raise UsageError(f"{name} has no column {missing[0]!r}", f"choose from {', '.join(found.columns)}")
    return found.select(columns) if columns else found


def as_csv(frame: pl.DataFrame) -> str:
    """RFC 4180 with a header; undefined is NaN, unknown is empty, texts are one printable line."""
    texts = pl.selectors.string()
    return frame.with_columns(texts.map_elements(_cell, return_dtype=pl.String)).write_csv()


def as_json_lines(frame: pl.DataFrame) -> str:
    """One object a line, null for what is undefined."""
    return "".join(
        json.dumps(json.loads(to_json(row)), ensure_ascii=True) + "\n" for row in frame.iter_rows(named=True)
    )


def _cell(text: str) -> str:
    bare = plain(text)
    return f"'{bare}" if bare.startswith(_FORMULA) else bare
