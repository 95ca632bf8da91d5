"""`prune`: which checkpoints to keep, and deleting the others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_forensics.commands.parameters import HERE, scanned
from lora_forensics.commands.printing import say

if TYPE_CHECKING:
    from lora_forensics.prune import Plan, Pruned


@click.command()
@click.argument("run", type=HERE)
@scanned
@click.option("--keep", multiple=True, help="Keep this one, too: its file, folder or step (repeatable).")
@click.option("--keep-every", type=click.IntRange(1), help="Keep every checkpoint whose step is a multiple of this.")
@click.option(
    "--whole-folders", is_flag=True, help="Delete optimizer, tokenizer and logs beside a deleted adapter, too."
)
@click.option(
    "--min-age", type=float, default=60.0, show_default=True, help="Do not delete if the run is younger: minutes."
)
@click.option("--by-weights", is_flag=True, help="Delete though no held-out sample stands behind the pick.")
@click.option("--delete", "really", is_flag=True, help="Delete; without it nothing is touched.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@click.option("-v", "--verbose", is_flag=True, help="List every file to delete.")
def prune(
    run: Path,
    out: Path,
    trainer: str | None,
    keep: tuple[str, ...],
    keep_every: int | None,
    whole_folders: bool,
    min_age: float,
    by_weights: bool,
    really: bool,
    as_json: bool,
    verbose: bool,
) -> int:
    """Say which checkpoints of a scanned run to keep and what the others take; delete them with --delete.

    RUN is a folder with one run, or FOLDER/NAME where several share a folder. Kept are the pick, its neighbours, the
    candidates, the turning point and the last. Exit 1 where the scan is no evidence to delete by, 3 where some files
    could not be deleted. Example: lora-forensics prune sample_runs/text_peft
    """
    from lora_forensics.errors import UnfinishedError
    from lora_forensics.pipeline import ScanOptions
    from lora_forensics.prune import PruneOptions, delete, plan_pruning
    from lora_forensics.reports import to_json

    options = PruneOptions(keep, keep_every, whole_folders, min_age)
    plan = plan_pruning(run, ScanOptions(out=out, trainer=trainer), options)
    if not as_json:
        say(_plan_text(plan, verbose))
    done = delete(plan, by_weights) if really and plan.files else None
    if as_json:
        click.echo(to_json({**plan.to_dict(), "done": done and done.to_dict()}), nl=False)
    else:
        say(_done_text(plan, done, really))
    if done and done.failed:
        name, reason = next(iter(done.failed.items()))
        raise UnfinishedError(f"{len(done.failed)} of {len(plan.files)} files are still there: {name}: {reason}")
    return 0


def _plan_text(plan: Plan, verbose: bool) -> str:
    from lora_forensics.reports.text import count, plain

    total = len(plan.run.checkpoints)
    lines = [f"{plain(plan.run.name)}: {count(total, 'checkpoint')}, {len(plan.keep)} to keep"]
    width = max(len(plain(name)) for name in plan.keep)
    lines += [f"  keep    {plain(name):{width}}  {plain(why)}" for name, why in plan.keep.items()]
    for name, why in list(plan.left.items())[: None if verbose else 5]:
        lines.append(f"  leave   {plain(name)}: {why}")
    if len(plan.left) > 5 and not verbose:
        lines.append(f"  leave   {len(plan.left) - 5} more (-v lists them)")
    names = [plan.relative(file.path) for file in plan.files] if verbose else []
    lines += [f"  delete  {plain(name)}" for name in names]
    if plan.files:
        steps = [checkpoint.step for checkpoint in plan.checkpoints]
        many = "what an interrupted pruning left"
        if steps:
            many = f"{count(len(steps), 'checkpoint')}, {plan.run.step_unit}s {steps[0]} to {steps[-1]}"
        lines.append(f"  delete  {many}: {count(len(plan.files), 'file')}, {size(plan.freed)}")
    if plan.state_bytes:
        lines.append(
            f"  {size(plan.state_bytes)} beside them stay; --whole-folders deletes optimizer states and the like"
        )
    return "\n".join(lines)


def _done_text(plan: Plan, done: Pruned | None, really: bool) -> str:
    from lora_forensics.reports.text import count

    if done is not None:
        return (
            f"deleted {count(len(done.deleted), 'file')}, {size(done.freed)}; the log is {plan.folder / 'pruned.json'}"
        )
    if not plan.files:
        return "nothing to delete"
    if really:
        return "nothing to delete"
    if plan.young:
        return f"nothing was deleted, and --delete would refuse: {plan.young}"
    how = "--delete --by-weights does it, and no held-out sample says so" if plan.by_weights else "--delete does it"
    return f"nothing was deleted: {how}"


def size(number: int) -> str:
    """'12.3 MB'; decimal units."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000  # type: ignore[assignment]
    return ""
