"""`check`: whether adapter files are sound, one by one; what the pre-commit hook runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_forensics.commands.parameters import HERE
from lora_forensics.commands.printing import say

if TYPE_CHECKING:
    from lora_forensics.records import Finding


@click.command()
@click.argument("files", nargs=-1, metavar="FILES...", type=HERE)
@click.option(
    "--fail-on",
    multiple=True,
    default=("error",),
    show_default=True,
    help="Exit with 1 on this rule, or on this severity or worse (info, warning, error; repeatable).",
)
def check(files: tuple[Path, ...], fail_on: tuple[str, ...]) -> int:
    """Inspect adapter files without a base model; exit 1 where one is damaged or has a finding that --fail-on names.

    Tensor files that hold no adapter are passed over, and nothing is said of what is sound.
    Example: lora-forensics check sample_runs/text_peft/output/adapter_model.safetensors
    """
    from lora_forensics.errors import CheckpointError
    from lora_forensics.gate import counts
    from lora_forensics.reports.text import plain
    from lora_forensics.rules import matching

    wanted = matching(fail_on)
    failed = False
    for path in files:
        try:
            findings = _findings(path)
        except CheckpointError as error:
            say(f"{plain(path)}: {plain(error.message).removeprefix(f'{plain(path)}: ')}")
            failed = True
            continue
        for finding in findings:
            failed = failed or counts(finding, wanted)
            say(f"{plain(path)}: {finding.severity}: {finding.rule}: {plain(finding.message)}")
    return int(failed)


def _findings(path: Path) -> list[Finding]:
    """What is wrong with a file that holds an adapter, or worth a second look; nothing of what it is compared with."""
    from lora_forensics.adapters import looks_like_adapter
    from lora_forensics.inspection.looking import adapter_file, inspect_file
    from lora_forensics.tensors import open_tensors

    if not looks_like_adapter(open_tensors(adapter_file(path)).infos):
        return []
    return [finding for finding in inspect_file(path, device="cpu").findings if finding.rule != "module-unresolved"]
