"""`inspect`: one checkpoint, or the difference of two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_forensics.commands.configured import chosen, configured, current, selecting
from lora_forensics.commands.parameters import PLACE
from lora_forensics.commands.scanning import SPECTRA
from lora_forensics.errors import UsageError

if TYPE_CHECKING:
    from lora_forensics.inspection.values import Contents, Difference, Inspection


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE [FILE]", type=PLACE)
@click.option("--base", multiple=True, type=PLACE, help="Base model: file or folder (repeatable).")
@click.option("--download", is_flag=True, help="Allow fetching the base model from the Hugging Face hub.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--spectra", is_flag=True, help=SPECTRA)
@click.option("--keys", is_flag=True, help="List every tensor with its statistics, and nothing else.")
@click.option("--metadata", is_flag=True, help="Print all metadata as it stands in the file, and nothing else.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@click.option("-v", "--verbose", is_flag=True, help="List every module.")
@selecting
@configured
def inspect(
    files: tuple[Path, ...],
    base: tuple[Path, ...],
    download: bool,
    device: str,
    spectra: bool,
    keys: bool,
    metadata: bool,
    as_json: bool,
    verbose: bool,
    **settings: Any,
) -> int:
    """Look at one checkpoint: metadata, kinds, ranks, scales, norms, spectra, health; of two files, the difference.

    FILE is a tensor file or the folder of an adapter. Example: lora-forensics inspect sample_runs/text_peft/output
    """
    from lora_forensics.console import terminal_width, use_color
    from lora_forensics.inspection.difference import compare_files
    from lora_forensics.inspection.looking import inspect_file, read_contents
    from lora_forensics.reports import to_json
    from lora_forensics.reports.inspection import inspection_text

    if len(files) > (1 if keys or metadata else 2):
        hint = "inspect looks at one file or compares two; --keys and --metadata are for one"
        raise UsageError(f"{len(files)} files are given", hint)
    selection, thresholds = chosen(settings), current().thresholds
    found: Contents | Inspection | Difference
    if keys or metadata:
        found = read_contents(files[0], keys, metadata)
    elif len(files) == 1:
        found = inspect_file(files[0], base, device, download=download, spectra=spectra, thresholds=thresholds)
        found = replace(found, findings=selection.told(found.findings))
    else:
        found = compare_files(files[0], files[1], base, device, download=download, thresholds=thresholds)
        first, second = (replace(one, findings=selection.told(one.findings)) for one in (found.first, found.second))
        found = replace(found, first=first, second=second)
    text = to_json(found.to_dict()) if as_json else inspection_text(found, terminal_width(), use_color(), verbose)
    click.echo(text, nl=False, color=use_color())
    return 0
