"""`formats` and `metrics`: what is read, and what the columns mean."""

from __future__ import annotations

import click


@click.command()
@click.option("--markdown", is_flag=True, help="As a Markdown page.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
def formats(markdown: bool, as_json: bool) -> int:
    """List the trainers, adapter kinds, base layouts and storage types that are read, and how they are recognised."""
    from lora_forensics.console import terminal_width
    from lora_forensics.formats import formats_json, formats_markdown, formats_text

    click.echo(
        formats_json() if as_json else formats_markdown() if markdown else formats_text(terminal_width()), nl=False
    )
    return 0


@click.command()
@click.option("--markdown", is_flag=True, help="As a Markdown page.")
def metrics(markdown: bool) -> int:
    """Describe every column of the Parquet files: meaning, unit, formula, source."""
    from lora_forensics.console import terminal_width
    from lora_forensics.reference import columns_markdown, columns_text

    click.echo(columns_markdown() if markdown else columns_text(terminal_width()), nl=False)
    return 0
