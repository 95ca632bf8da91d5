"""What a probe of a run found, and how it decides which checkpoint to keep. Never touches torch.

A probe scores a few checkpoints, by a command or on held-out samples. Lower is better throughout, unless the scorer was
told to maximise. Samples are the same for all checkpoints, so differences are taken sample by sample.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lora_forensics.records import Candidate, Finding
from lora_forensics.series import write_text

FILE = "probe.json"
"""Its name in a run's folder of OUT."""
CONFIDENCE = 0.95
BEST = "best in the probe"
"""Why a checkpoint is a candidate that is one for nothing else."""
_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Score:
    """One checkpoint, scored."""

    checkpoint: str
    fingerprint: str
    """Of the checkpoint's file when it was scored."""
    scorer: str
    """Identity of the scorer: two scores are compared only where it is the same."""
    value: float
    samples: tuple[float, ...] = ()
    """One number a sample, if the scorer gave them; `value` is their mean."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The last probe that came to its end."""

    scorer: str
    """Identity of the scorer."""
    what: str
    """What it scores by, in words."""
    maximise: bool
    checkpoints: Mapping[str, str]
    """Name to fingerprint of those that there were to choose from."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Checkpoint to why it has no score."""


@dataclass(frozen=True, slots=True)
class Probed:
    """Every score of a run that is known, and the last probe: probe.json."""

    scores: tuple[Score, ...] = ()
    asked: Asked | None = None

    def known(self, scorer: str, prints: Mapping[str, str]) -> dict[str, Score]:
        """Scores by this scorer of files that are as they were, by checkpoint."""
        own = [score for score in self.scores if score.scorer == scorer]
        return {score.checkpoint: score for score in own if prints.get(score.checkpoint) == score.fingerprint}

    def with_score(self, score: Score) -> Probed:
        """With this score in the place of an older one."""
        same = (score.scorer, score.checkpoint)
        kept = [other for other in self.scores if (other.scorer, other.checkpoint) != same]
        return Probed((*kept, score), self.asked)

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready form."""
        return {"schema": _SCHEMA, **asdict(self)}


def load_probed(folder: Path) -> Probed:
    """What is known of a run, empty where nothing is; a damaged file is as good as none."""
    try:
        document = json.loads((folder / FILE).read_text("utf-8"))
        if document["schema"] != _SCHEMA:
            return Probed()
        scores = tuple(Score(**{**entry, "samples": tuple(entry["samples"])}) for entry in document["scores"])
        return Probed(scores, Asked(**document["asked"]) if document["asked"] else None)
    except (OSError, ValueError, KeyError, TypeError):
        return Probed()


def save_probed(folder: Path, probed: Probed) -> None:
    """Write probe.json, whole or not at all.

    Raises:
        SeriesError: the folder cannot be written.
    """
    write_text(folder / FILE, json.dumps(probed.to_dict(), indent=1) + "\n")


@dataclass(frozen=True, slots=True)
class Difference:
    """By how much a checkpoint is worse than the best one."""

    mean: float
    low: float | None
    """The 95 % interval of the mean over the samples (Student's t); None with fewer than two samples."""
    high: float | None

    @property
    def noise(self) -> bool:
        """Whether the samples cannot tell the two apart."""
        return self.low is not None and self.low <= 0


def difference(worse: Sequence[float], best: Sequence[float]) -> Difference:
    """Paired difference of two rows of losses on the same samples."""
    gaps = np.asarray(worse, dtype=np.float64) - np.asarray(best, dtype=np.float64)
    mean = float(gaps.mean())
    if gaps.size < 2:
        return Difference(mean, None, None)
    from scipy import stats  # takes longer than a rescan with nothing new

    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, gaps.size - 1) * gaps.std(ddof=1) / math.sqrt(gaps.size))
    return Difference(mean, mean - half, mean + half)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the last probe says of the checkpoints that are there now."""

    checkpoint: str
    step: int
    evidence: dict[str, Any]
    """`evidence.probe` of the verdict."""
    findings: tuple[Finding, ...]


def answer_of(
    probed: Probed | None, steps: Mapping[str, int], prints: Mapping[str, str | None], unit: str = "step"
) -> Answer | None:
    """The best of the scored checkpoints, those that are as good within the noise, and what to know about it.

    Args:
        probed: what probe.json holds.
        steps: checkpoint to its step, of those that may be kept, in order.
        prints: checkpoint to its fingerprint; None where it is not known.
        unit: what steps count.
    """
    if probed is None or probed.asked is None:
        return None
    asked = probed.asked
    there = {name: prints.get(name) or asked.checkpoints.get(name, "") for name in steps}
    scores = probed.known(asked.scorer, there)
    if not scores:
        return None
    losses = {name: losses_of(scores[name], asked.maximise) for name in steps if name in scores}
    best = best_of(losses)
    gaps = {name: difference(row, losses[best]) for name, row in losses.items()}
    flat = [name for name in gaps if name == best or gaps[name].noise]
    later = [name for name in steps if name not in asked.checkpoints]
    runner_up = min((name for name in gaps if name != best), key=lambda name: gaps[name].mean, default=None)
    entries = [
        {
            "checkpoint": name,
            "step": steps[name],
            "score": scores[name].value,
            "worse_by": gap.mean,
            "interval": None if gap.low is None else [gap.low, gap.high],
        }
        for name, gap in gaps.items()
    ]
    between = bracket([name in gaps for name in steps], list(steps).index(best))
    names = list(steps)
    evidence = {
        "scorer": asked.what,
        "maximise": asked.maximise,
        "samples": len(losses[best]),
        "evaluations": entries,
        "score": scores[best].value,
        "runner_up": runner_up and next(entry for entry in entries if entry["checkpoint"] == runner_up),
        "flat": [{"checkpoint": name, "step": steps[name]} for name in flat],
        "bracket": [None if at is None else steps[names[at]] for at in between],
        "failed": [{"checkpoint": name, "reason": reason} for name, reason in asked.failed.items()],
        "later": later,
    }
    findings = _findings(evidence, steps, best, unit)
    return Answer(best, steps[best], evidence, tuple(findings))


def with_best(candidates: Sequence[Candidate], answer: Answer) -> tuple[Candidate, ...]:
    """The candidates and, if it is none of them, the best of the probe."""
    known = any(entry.checkpoint == answer.checkpoint for entry in candidates)
    return (*candidates, *(() if known else (Candidate(answer.checkpoint, answer.step, BEST),)))


def losses_of(score: Score, maximise: bool) -> tuple[float, ...]:
    """One loss a sample, or one in all; lower is better."""
    row = score.samples or (score.value,)
    return tuple(-value for value in row) if maximise else row


def best_of(losses: Mapping[str, Sequence[float]]) -> str:
    """The checkpoint with the lowest mean; the first of equals."""
    return min(losses, key=lambda name: float(np.mean(losses[name])))


def bracket(scored: Sequence[bool], best: int) -> tuple[int | None, int | None]:
    """The nearest scored checkpoints before and behind the best one; None where there is none."""
    before = next((at for at in range(best - 1, -1, -1) if scored[at]), None)
    behind = next((at for at in range(best + 1, len(scored)) if scored[at]), None)
    return before, behind


def _findings(evidence: Mapping[str, Any], steps: Mapping[str, int], best: str, unit: str) -> list[Finding]:
    found = []
    names = list(steps)
    if evidence["later"]:
        message = f"{_count(evidence['later'])} came after the probe: its answer knows nothing of them"
        found.append(Finding("probe-stale", "warning", message, "probe again: what was scored is not scored again"))
    flat = [entry["step"] for entry in evidence["flat"]]
    if len(flat) > 1:
        where = ", ".join(map(str, flat))
        message = f"any of {unit}s {where} would do: their differences lie within the noise of the samples"
        found.append(Finding("probe-flat", "info", message, "more samples tell more; of equals the lowest is kept"))
    elif evidence["samples"] < 2:
        message = "one number for each checkpoint: how noisy the probe's answer is, is not known"
        found.append(Finding("probe-flat", "info", message, "print a JSON list with one number for each sample"))
    low, high = evidence["bracket"]
    if (low is None and best != names[0]) or (high is None and best != names[-1]):
        message = f"the best in the probe lies at the {'first' if low is None else 'last'} {unit} that was scored"
        found.append(Finding("probe-open", "warning", message, "allow more evaluations"))
    return found


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} checkpoint{'' if len(names) == 1 else 's'}"
