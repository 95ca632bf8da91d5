"""`report`: a scan rendered again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_forensics.commands.configured import chosen, configured, current, selecting
from lora_forensics.commands.gating import REDACT
from lora_forensics.commands.parameters import PLACE
from lora_forensics.commands.printing import complain, print_report
from lora_forensics.commands.scanning import assess_options, assessing, report_names


@click.command()
@click.argument("out", type=PLACE)
@assessing
@click.option(
    "--report", "reports", multiple=True, help="Report to write (repeatable; those that are there if left out)."
)
@click.option("--redact", is_flag=True, help=REDACT)
@click.option("--json", "as_json", is_flag=True, help="Print summary.json and nothing else.")
@click.option("-v", "--verbose", is_flag=True, help="List every skipped file.")
@selecting
@configured
def report(out: Path, reports: tuple[str, ...], redact: bool, as_json: bool, verbose: bool, **settings: Any) -> int:
    """Render the reports of a scan again from its tables in OUT; needs neither torch nor the checkpoints.

    With --window, --detector, ... the verdicts are drawn anew. Example: lora-forensics report forensics
    """
    from lora_forensics.rules import Thresholds
    from lora_forensics.scan import present, write_redacted
    from lora_forensics.scan import report as run_report

    source = click.get_current_context().get_parameter_source
    selection = chosen(settings)
    changed = any(source(name) is not click.core.ParameterSource.DEFAULT for name in settings)
    options = assess_options(settings) if changed or current().thresholds != Thresholds() else None
    names = report_names(reports) or present(out)
    summary, lost = run_report(out, names, options, selection)
    if redact:
        summary, lost = write_redacted(summary, names, plots=True), []
    print_report("json" if as_json else "terminal", summary, verbose=verbose)
    for entry in lost:
        complain(f"{entry.path}: {entry.reason}")
    return 3 if lost else 0
