"""Reference pages that are made from the code: the columns of every Parquet file."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from lora_forensics.series import (
    CHECKPOINT_COLUMNS,
    COURSE_COLUMNS,
    RUN_COLUMNS,
    RUN_MODULE_COLUMNS,
    SERIES_COLUMNS,
    Column,
)
from lora_forensics.tables import LAYER_COLUMNS

TABLES: dict[str, tuple[str, Sequence[Column]]] = {
    "layers.parquet": ("one row per checkpoint and module", LAYER_COLUMNS),
    "checkpoints.parquet": ("one row per checkpoint: what the trainer left", CHECKPOINT_COLUMNS),
    "series.parquet": (
        "one row per checkpoint used; `mean_<metric>` columns follow, the means over the same modules",
        (*SERIES_COLUMNS, *COURSE_COLUMNS),
    ),
    "modules.parquet": ("one row per module", RUN_MODULE_COLUMNS),
    "runs.parquet": ("one row per run of the last scan", RUN_COLUMNS),
}
"""File to what its rows are, and its columns."""


def columns_text(width: int = 80) -> str:
    """All columns for the terminal."""
    lines = []
    for name, (rows, columns) in TABLES.items():
        lines += [textwrap.fill(f"{name}: {rows}".replace("`", ""), width, subsequent_indent="  "), ""]
        for column in columns:
            unit = f" [{column.unit}]" if column.unit else ""
            head = f"  {column.name}  ({column.dtype}){unit}"
            lines.append(textwrap.fill(head, width, subsequent_indent=" " * 6))
            details = [column.meaning, column.formula and f"= {column.formula}", column.source]
            lines += [
                textwrap.fill(d, width, initial_indent="      ", subsequent_indent="      ") for d in details if d
            ]
        lines.append("")
    return "\n".join(lines)


def columns_markdown() -> str:
    """All columns as the page docs/columns.md."""
    lines = [
        "# Columns",
        "",
        "Made by `lora-forensics metrics --markdown`; every file carries the same text in its own metadata.",
        "Unknown is null, undefined is NaN. W is the frozen weight, D the change, A and B its factors, n a row of W.",
    ]
    for name, (rows, columns) in TABLES.items():
        lines += ["", f"## {name}", "", f"{rows[0].upper()}{rows[1:]}.", ""]
        lines += ["| column | type | unit | meaning | formula | source |", "|---|---|---|---|---|---|"]
        for column in columns:
            cells = (column.meaning, f"`{column.formula}`" if column.formula else "", column.source)
            meaning, formula, source = (cell.replace("|", "\\|") for cell in cells)
            lines.append(f"| `{column.name}` | {column.dtype} | {column.unit} | {meaning} | {formula} | {source} |")
    return "\n".join(lines) + "\n"
