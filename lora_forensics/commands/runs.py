"""`runs`: what there is to scan."""

from __future__ import annotations

from pathlib import Path

import click

from lora_forensics.commands.parameters import PLACE


@click.command()
@click.argument("path", type=PLACE)
@click.option("--trainer", help="Look for this trainer's layout only.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@click.option("-v", "--verbose", is_flag=True, help="List every skipped file.")
def runs(path: Path, trainer: str | None, as_json: bool, verbose: bool) -> int:
    """List the runs below PATH: trainer, checkpoints, rates, base model; and what is skipped, and why.

    Reads headers only. Example: lora-forensics runs sample_runs/
    """
    from lora_forensics.console import terminal_width
    from lora_forensics.discovery import discover_runs, nothing_found
    from lora_forensics.listing import listing_json, listing_text
    from lora_forensics.records import Skipped

    found = list(discover_runs(path, trainer))
    click.echo(listing_json(found) if as_json else listing_text(found, terminal_width(), verbose), nl=False)
    skipped = [entry for entry in found if isinstance(entry, Skipped)]
    if len(skipped) == len(found):
        raise nothing_found([path], skipped)
    return 0
