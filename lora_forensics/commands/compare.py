"""`compare`: runs side by side."""

from __future__ import annotations

from pathlib import Path

import click

from lora_forensics.commands.parameters import FOLDER_HERE, HERE


@click.command()
@click.argument("outs", nargs=-1, required=True, metavar="OUT...", type=HERE)
@click.option(
    "--align",
    type=click.Choice(("step", "epoch", "dose")),
    default="step",
    show_default=True,
    help="Where runs are compared: at the same step, epoch, or sum of the learning rates.",
)
@click.option("--figure", type=FOLDER_HERE, help="Draw comparison.png and comparison.svg into this folder.")
@click.option("--html", type=HERE, help="Write one page with everything into this file; it opens without a network.")
@click.option("--redact", is_flag=True, help="Leave out paths and names that people chose.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@click.option("-v", "--verbose", is_flag=True, help="Also what is the same in all runs, and all measures.")
def compare(
    outs: tuple[Path, ...],
    align: str,
    figure: Path | None,
    html: Path | None,
    redact: bool,
    as_json: bool,
    verbose: bool,
) -> int:
    """Set runs side by side: settings that differ, verdicts, and courses at the same step, epoch or dose.

    OUT is the folder of a scan, for all of its runs, or OUT/RUN. Example: lora-forensics compare forensics
    """
    from lora_forensics.comparison import compare_runs
    from lora_forensics.comparison.figure import draw_comparison
    from lora_forensics.comparison.page import write_page
    from lora_forensics.comparison.text import comparison_text
    from lora_forensics.console import terminal_width, use_color
    from lora_forensics.reports import to_json
    from lora_forensics.series import write_bytes

    found = compare_runs(outs, align, redact)
    if figure is not None:
        for name, content in draw_comparison(found).items():
            write_bytes(figure / name, content)
    if html is not None:
        write_page(found, html)
    text = to_json(found.to_dict()) if as_json else comparison_text(found, terminal_width(), use_color(), verbose)
    click.echo(text, nl=False, color=use_color())
    return 0
