"""`probe`: a few checkpoints scored on what was not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_forensics.commands.configured import configured
from lora_forensics.commands.parameters import HERE
from lora_forensics.commands.printing import complain, print_report, say
from lora_forensics.commands.scanning import assessing, measuring, scan_options


@click.command()
@click.argument("run", type=HERE)
@click.option("--score", metavar="COMMAND", help="Command with {checkpoint} in it; its last line is a number.")
@click.option("--held-out", type=HERE, help="Samples not trained on: .txt, .jsonl, or a folder of images.")
@click.option("--maximise", is_flag=True, help="The command's number is better the higher it is.")
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), help="Seconds that the command has for a checkpoint."
)
@click.option(
    "--evaluations", type=click.IntRange(1), default=6, show_default=True, help="Checkpoints that are scored at most."
)
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as one JSON document and nothing else.")
@click.option("-v", "--verbose", is_flag=True, help="List all findings.")
@measuring
@assessing
@configured
def probe(run: Path, evaluations: int, as_json: bool, verbose: bool, **settings: Any) -> int:
    """Score a few checkpoints on what was not trained on, and keep the best of them.

    RUN as for `pick`. Scores are remembered, and the answer stands in the verdict until checkpoints change.
    Example: lora-forensics probe sample_runs/text_peft --held-out sample_runs/text_peft/held_out.txt
    """
    from lora_forensics.console import console_progress
    from lora_forensics.probe import ProbeOptions
    from lora_forensics.probe.probing import probe_run

    asked = {name: settings[name] for name in ("score", "held_out", "maximise", "timeout", "device")}
    options = ProbeOptions(**asked, evaluations=evaluations, workers=settings["workers"] or 1, again=settings["rescan"])
    with console_progress(enabled=not as_json) as progress:
        done = probe_run(run, scan_options(settings, (), progress), options)
    print_report("json" if as_json else "terminal", done.summary, verbose=verbose)
    for name, error in done.failed:
        complain(f"{name} has no score: {error.message}", details=error.hint.splitlines())
    if not as_json:
        say(done.said())
    return 0
