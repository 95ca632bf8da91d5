"""`table`: the rows of a scan's Parquet files as CSV or JSON."""

from __future__ import annotations

from pathlib import Path

import click

from lora_forensics.commands.parameters import HERE

TABLES = ("runs", "checkpoints", "layers", "series", "modules")


@click.command()
@click.argument("out", type=HERE)
@click.argument("name", metavar="TABLE", type=click.Choice(TABLES))
@click.option("--columns", help="Only these, joined by commas; `lora-forensics metrics` describes them.")
@click.option("--where", metavar="SQL", help="Only rows for which this holds, such as: step >= 100 AND rank = 8")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line instead of CSV.")
def table(out: Path, name: str, columns: str | None, where: str | None, as_json: bool) -> int:
    """Print a table of a scan as CSV: runs, checkpoints, layers, series or modules.

    OUT is the folder of a scan, for all of its runs, or OUT/RUN. In CSV, a text that a spreadsheet would take for a
    formula has an apostrophe before it. Example: lora-forensics table forensics runs --columns run,keep
    """
    from lora_forensics.rows import as_csv, as_json_lines, rows

    found = rows(out, name, tuple(filter(None, (columns or "").split(","))), where)
    click.echo(as_json_lines(found) if as_json else as_csv(found), nl=False)
    return 0
