"""Which checkpoints enter a mean, and with which weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_forensics.checkpoint_names import named
from lora_forensics.errors import EvidenceError, UsageError
from lora_forensics.records import Checkpoint, Run, Verdict


@dataclass(frozen=True, slots=True)
class Choice:
    """What is averaged."""

    checkpoints: tuple[Checkpoint, ...]
    """Oldest first."""
    weights: tuple[float, ...]
    """Their sum is 1."""
    why: str
    """In one clause."""
    method: str
    """`mean`, or `ema` and its decay."""


def choose(
    run: Run,
    verdict: Verdict | None,
    names: Sequence[str] = (),
    around: str | None = None,
    window: int = 3,
    ema: float | None = None,
) -> Choice:
    """The checkpoints that are named, or a window of neighbours around one: the kept one unless another is named.

    Raises:
        UsageError: a name that no checkpoint has, options that exclude each other, or fewer than two checkpoints.
        EvidenceError: nothing is named, and no verdict names one to keep.
    """
    if names and around:
        raise UsageError("--checkpoints names all that are averaged: --around has no part in it", "use one of them")
    if ema is not None and not 0 < ema < 1:
        raise UsageError(f"a decay of {ema:g} is not between 0 and 1", "use --ema 0.5, say")
    if names:
        wanted = {checkpoint.name for name in names for checkpoint in named((*run.checkpoints, *run.unplaced), name)}
        found = tuple(c for c in (*run.checkpoints, *run.unplaced) if c.name in wanted)
        if any(checkpoint.step is None for checkpoint in found) and ema is not None:
            raise UsageError("one of these has no known step: an EMA needs their order", "leave --ema out")
        why = "those that were named"
    else:
        centre, what = _centre(run, verdict, around)
        place = next(index for index, checkpoint in enumerate(run.checkpoints) if checkpoint.name == centre)
        found = run.checkpoints[max(place - (window - 1) // 2, 0) : place + window // 2 + 1]
        why = f"{what} and its neighbours"
    if len(found) < 2:
        raise UsageError(f"one checkpoint alone has no mean: {why}", "name several with --checkpoints, or --window 3")
    return Choice(found, _weights(len(found), ema), why, "mean" if ema is None else f"ema {ema:g}")


def _centre(run: Run, verdict: Verdict | None, around: str | None) -> tuple[str, str]:
    """The checkpoint in the middle, and what it is."""
    if around is not None:
        (centre, *more) = named(run.checkpoints, around)
        if more:
            raise UsageError(f"{around!r} names several checkpoints", f"write one of them in full: {centre.name}")
        return centre.name, "the one that was named"
    if verdict is None:
        raise EvidenceError(f"{run.name}: no scan of it is stored", "scan it, or name a checkpoint with --around")
    if verdict.keep is None:
        hint = "name a checkpoint with --around, or all with --checkpoints"
        raise EvidenceError(f"{run.name}: its verdict names no checkpoint to keep: {verdict.message}", hint)
    if verdict.keep.checkpoint not in {checkpoint.name for checkpoint in run.checkpoints}:
        raise EvidenceError(f"{run.name}: {verdict.keep.checkpoint}, the one to keep, is not there", "scan again")
    return verdict.keep.checkpoint, f"the kept one ({verdict.keep.rests_on})"


def _weights(count: int, ema: float | None) -> tuple[float, ...]:
    """Equal, or of e_1 = D_1, e_k = decay e_(k-1) + (1 - decay) D_k from the oldest on."""
    if ema is None:
        return (1 / count,) * count
    return tuple(ema ** (count - 1 - k) * (1.0 if k == 0 else 1 - ema) for k in range(count))
