"""`average`: the mean of neighbouring checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_forensics.commands.parameters import HERE, scanned
from lora_forensics.commands.printing import say

if TYPE_CHECKING:
    from lora_forensics.average import Average


@click.command()
@click.argument("run", type=HERE)
@click.option("--checkpoints", help="Average these: files, folders or steps, joined by commas.")
@click.option("--around", help="Average this one (file, folder or step) and its neighbours, not the kept one.")
@click.option(
    "--window", type=click.IntRange(2), default=3, show_default=True, help="How many, the middle one included."
)
@click.option("--ema", type=float, help="Exponential moving average with this decay, from the oldest on.")
@click.option("--rank", help="Rank to save: a number, or full for an exact mean; the run's own if left out.")
@click.option("--dtype", help="Type to save: float32, float16 or bfloat16; the run's own if left out.")
@click.option("--output", type=HERE, help="File or folder to write; a name in OUT/<run> if left out.")
@click.option("--force", is_flag=True, help="Overwrite what is there.")
@click.option("--base", multiple=True, type=HERE, help="Base model (DoRA needs it): file or folder.")
@scanned
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@click.option("-v", "--verbose", is_flag=True, help="List the error of every module.")
def average(
    run: Path,
    checkpoints: str | None,
    around: str | None,
    window: int,
    ema: float | None,
    rank: str | None,
    dtype: str | None,
    output: Path | None,
    force: bool,
    base: tuple[Path, ...],
    out: Path,
    trainer: str | None,
    as_json: bool,
    verbose: bool,
) -> int:
    """Average checkpoints of a run into one adapter of the run's own form, and say how exact it is.

    RUN is a folder with one run, or FOLDER/NAME where several share a folder. Taken are the kept checkpoint and its
    neighbours unless others are named. Exit 1 where no verdict says which.
    Example: lora-forensics average sample_runs/text_peft
    """
    from lora_forensics.average import DTYPES, AverageOptions, average_run
    from lora_forensics.errors import UsageError
    from lora_forensics.pipeline import ScanOptions
    from lora_forensics.reports import to_json

    if rank not in (None, "full") and not (rank.isdecimal() and 0 < int(rank) < 1 << 16):
        raise UsageError(f"a rank of {rank!r} is no whole number above 0", "use --rank 16, say, or --rank full")
    if dtype not in (None, *DTYPES):
        raise UsageError(f"no type is called {dtype!r}", f"choose from {', '.join(DTYPES)}")
    options = AverageOptions(
        tuple(filter(None, (checkpoints or "").split(","))),
        around,
        window,
        ema,
        int(rank) if rank and rank != "full" else rank,
        dtype,
        output,
        force,
    )
    done = average_run(run, ScanOptions(out=out, trainer=trainer, base=base), options)
    if as_json:
        click.echo(to_json(done.to_dict()), nl=False)
    else:
        say(_text(done, verbose))
    return 0


def _text(done: Average, verbose: bool) -> str:
    from lora_forensics.records import describe_adapter
    from lora_forensics.reports.text import count, number, plain

    choice = done.choice
    lines = [f"{plain(done.run)}: {choice.method} of {count(len(choice.checkpoints), 'checkpoint')}, {choice.why}"]
    width = max(len(plain(checkpoint.name)) for checkpoint in choice.checkpoints)
    for checkpoint, weight in zip(choice.checkpoints, choice.weights, strict=True):
        lines.append(f"  {plain(checkpoint.name):{width}}  weight {weight:.4g}")
    ranks = sorted({mean.rank for mean in done.modules.values() if mean.rank})
    lines.append(f"  {describe_adapter(done.kinds, ranks)} on {count(len(done.modules), 'module')}")
    errors = done.errors()
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else -1)
    lines.append(
        f"  relative error {number(done.relative_error, 2)}; largest {number(errors[worst], 2)}: {plain(worst)}"
    )
    if ranks and ranks[-1] < done.full_rank:
        lines.append(f"  the mean has rank {done.full_rank}: --rank full saves it whole")
    if verbose:
        lines += [f"    {number(error, 2):>8}  {plain(name)}" for name, error in errors.items()]
    return "\n".join([*lines, f"wrote {plain(done.path)}"])
