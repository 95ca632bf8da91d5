"""A run put together from its files and from what the trainer logged: the part that all trainers have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_forensics.checkpoints.history import Curve
from lora_forensics.checkpoints.interface import Trainer, place, with_rates
from lora_forensics.records import BaseReference, Checkpoint, Finding, Run, Skipped
from lora_forensics.tensors import same_content


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a trainer left about one run; all steps are optimizer steps, what is unknown is empty."""

    rates: Curve = field(default_factory=Curve)
    """As logged; where the log does not reach, nothing is known."""
    scheduled: Curve = field(default_factory=Curve)
    """Rates as the settings determine them, at all steps; they count where no log tells them."""
    train_loss: Curve = field(default_factory=Curve)
    held_out: Curve = field(default_factory=Curve)
    epochs: Curve = field(default_factory=Curve)
    """Epochs trained at some steps."""
    steps_per_epoch: float | None = None
    train_samples: int | None = None
    batch_size: int | None = None
    base: BaseReference = field(default_factory=BaseReference)
    findings: tuple[Finding, ...] = ()


def assemble(
    trainer: Trainer,
    folder: Path,
    name: str,
    found: Sequence[Checkpoint],
    told: Told,
    skipped: Iterable[Skipped] = (),
) -> Run:
    """The run of these checkpoints: placed, dated, with rates and losses.

    Of several checkpoints at one step the first given counts. An epoch that a checkpoint brings along stays.
    """
    placed = place(list(found))
    known = [_dated(checkpoint, told) for checkpoint in placed.checkpoints]
    lost = tuple(skipped)
    return Run(
        name=name,
        path=folder,
        trainer=trainer.name,
        checkpoints=_rated(known, told),
        unplaced=placed.unplaced,
        steps_per_epoch=told.steps_per_epoch,
        train_samples=told.train_samples,
        batch_size=told.batch_size,
        base=told.base,
        findings=(*placed.findings, *told.findings, *elsewhere(placed.checkpoints, told.held_out, lost)),
        skipped=lost,
        save_more_often=trainer.save_more_often,
    )


def with_final(found: Sequence[Checkpoint], final: Checkpoint, step: int | None) -> list[Checkpoint]:
    """The checkpoints of a run and the file that was written at its end, at this step if it is no copy of the last.

    A step before that of the last checkpoint cannot be: a log may end early.
    """
    last = max(found, key=lambda checkpoint: checkpoint.step or 0, default=None)
    if last is not None and same_content(final.path, last.path):
        return [*found, replace(final, step=last.step)]
    possible = step is not None and (last is None or step > (last.step or 0))
    return [*found, replace(final, step=step if possible else None)]


def as_epochs(run: Run, finding: Finding) -> Run:
    """The same run where its steps are epochs, since nothing else is known."""
    dated = [replace(c, epoch=None if c.step is None else float(c.step)) for c in run.checkpoints]
    return replace(
        run, checkpoints=tuple(dated), step_unit="epoch", steps_per_epoch=1.0, findings=(*run.findings, finding)
    )


def elsewhere(checkpoints: Sequence[Checkpoint], held_out: Curve, lost: Sequence[Skipped] = ()) -> list[Finding]:
    """A finding if the lowest held-out loss was logged at a step that was not saved."""
    if not held_out.steps:
        return []
    saved = {checkpoint.step for checkpoint in checkpoints}
    best = min(range(len(held_out.steps)), key=lambda index: held_out.values[index])
    if held_out.steps[best] in saved:
        return []
    message = f"the lowest held-out loss, {held_out.values[best]:.4g}, was logged at step {held_out.steps[best]}, "
    if any(f"checkpoint-{held_out.steps[best]}" in entry.path.parts for entry in lost):
        return [Finding("held-out-elsewhere", "warning", message + "whose checkpoint cannot be read")]
    common = sum(step in saved for step in held_out.steps)
    message += f"which was not saved; {common or 'none'} of {len(held_out.steps)} evaluations fall on saved checkpoints"
    return [Finding("held-out-elsewhere", "warning", message, "evaluate as often as the trainer saves")]


def mean_of(curves: Sequence[Curve]) -> Curve:
    """The mean of several curves where all of them have a value."""
    steps = set.intersection(*(set(curve.steps) for curve in curves)) if curves else set()
    return Curve.of((step, sum(curve.at(step) or 0.0 for curve in curves) / len(curves)) for step in steps)


def _rated(checkpoints: Sequence[Checkpoint], told: Told) -> tuple[Checkpoint, ...]:
    """With learning rates and doses; unknown where neither log nor settings tell them."""
    covered = [told.rates.covers(checkpoint.step or 0) for checkpoint in checkpoints]
    if not all(covered) and told.scheduled.steps:
        return with_rates(checkpoints, told.scheduled)
    from_start = told.rates.covers(1)
    return tuple(
        replace(c, learning_rate=c.learning_rate if known else None, dose=c.dose if known and from_start else None)
        for c, known in zip(with_rates(checkpoints, told.rates), covered, strict=True)
    )


def _dated(checkpoint: Checkpoint, told: Told) -> Checkpoint:
    step, epoch = checkpoint.step or 0, checkpoint.epoch
    if epoch is None:
        epoch = told.epochs.at(step)
    if epoch is None and told.steps_per_epoch:
        epoch = step / told.steps_per_epoch
    loss = told.train_loss.last(step) if told.train_loss.covers(step) else None
    return replace(checkpoint, epoch=epoch, train_loss=loss, held_out_loss=told.held_out.at(step))
