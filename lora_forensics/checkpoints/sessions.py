"""Sessions that wrote under the same names: one training that was resumed, or several."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from lora_forensics.checkpoints.history import Curve
from lora_forensics.records import Checkpoint, Finding


def goes_on(before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether a later session, which saved at the steps `after`, resumed the one that saved at `before`.

    A rerun starts at its first interval again. Both ascend. One checkpoint tells no interval, and joins nothing; of
    several intervals, as where steps and epochs are saved, the largest counts.
    """
    if len(before) < 2 or not after:
        return False
    interval = max(two - one for steps in (before, after) for one, two in pairwise(steps))
    return interval < after[0] <= before[-1] + interval


def continued(curves: Sequence[Curve], offsets: Sequence[int] | None = None) -> Curve:
    """The curves of sessions on one axis: each counts until the next begins. Offsets are added to their steps."""
    points: dict[int, float] = {}
    for curve, offset in zip(curves, offsets or [0] * len(curves), strict=True):
        if curve.steps:
            first = curve.steps[0] + offset
            points = {step: value for step, value in points.items() if step < first}
            points.update(zip((step + offset for step in curve.steps), curve.values, strict=True))
    return Curve.of(points.items())


def resumed(step: int) -> Finding:
    """Said of a run of several sessions; `step` is the first that the later one saved."""
    return Finding("resumed", "info", f"the training was interrupted and resumed: a new session begins at step {step}")


def superseded(lost: Sequence[Checkpoint], step: int) -> Finding:
    """Said of checkpoints that an interrupted session saved after the step from which it was resumed."""
    names = ", ".join(checkpoint.name for checkpoint in lost[:3]) + (", ..." if len(lost) > 3 else "")
    message = f"{names}: saved before the training was resumed, and trained anew from step {step} on; left out"
    return Finding("superseded", "info", message)


def overwritten(final: str, option: str) -> Finding:
    """Said of a run whose file without a number is another training's; `option` names a run in this trainer."""
    message = f"{final} was written by another training under this name: it is not the end of this run"
    return Finding("final-overwritten", "warning", message, f"give each training its own name ({option})")
