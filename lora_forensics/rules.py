"""Rules: the stable ids of findings. A finding with another id does not exist; `--fail-on` takes these."""

from __future__ import annotations

RULES: dict[str, str] = {
    "nonfinite": "NaN or Inf in saved weights",
    "zero-change": "an adapter that changes nothing",
    "dead-modules": "modules that change nothing, among others that change",
    "outlier-modules": "modules that change far more than others of their sort",
    "larger-than-weight": "changes that are larger than the weight below them",
    "flushed-to-zero": "numbers that a narrow type has rounded to zero",
    "checkpoint-undefined": "a checkpoint at which most modules have no cosine, left out of the series",
    "duplicate": "files with the same tensors, counted once",
    "same-step": "two different files of one step, of which one is left out",
    "step-unknown": "a file whose training step cannot be known, left out",
    "epochs-only": "no metadata: steps are unknown and epochs are counted instead",
    "resumed": "a training that was interrupted and resumed: several sessions, one run",
    "superseded": "checkpoints saved after the step from which the training was resumed, left out",
    "pruned": "the trainer deleted earlier checkpoints of the run",
    "log-unreadable": "a log beside the run that cannot be read, or not to its end",
    "module-unresolved": "modules without a weight in the base model",
    "module-unread": "modules of an adapter kind that is not read",
    "scale-unknown": "no file tells the scale; norms assume 1",
    "svd-initialised": "an initialisation that changes the base weight, such as PiSSA",
    "base-missing": "the base model of an earlier scan is not found now; new checkpoints are not measured",
    "full-weights": "full weights saved beside the adapter, which are not compared",
    "base-nonfinite": "NaN or Inf in the base model",
    "base-hash-differs": "the base model is not the one that the run recorded",
    "learning-rate-unknown": "CS-Fluctuation is not divided by the learning rate",
    "held-out-elsewhere": "held-out loss was lowest at a step that was not saved",
    "mixed-runs": "modules, shapes or ranks change inside a run",
    "unchanged": "checkpoints that equal the one before them",
    "uneven-cadence": "checkpoints at uneven intervals, interpolated",
    "follows-schedule": "a turning point that may only follow warm-up or decay of the learning rate",
    "weak-evidence": "the answer rests on saved weights alone",
    "few-checkpoints": "too few checkpoints for a second valley; which ones to compare",
    "last-is-past": "training went on past the checkpoint to keep",
}
"""Id to what it is about."""
