"""What a scorer is: it gives one checkpoint a number, or one number for each of a few samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from lora_forensics.errors import ScoreError
from lora_forensics.records import Checkpoint, Run


@dataclass(frozen=True, slots=True)
class ProbeOptions:
    """How to score, and how often."""

    score: str | None = None
    """A command with {checkpoint} in it."""
    held_out: Path | None = None
    """Samples that were not trained on: a file of texts, or a folder of captioned images."""
    maximise: bool = False
    """Higher scores are better."""
    timeout: float | None = None
    """Seconds that a command may take for one checkpoint."""
    evaluations: int = 6
    """Checkpoints that are scored at most, those counted that were scored before."""
    workers: int = 1
    """Commands that run at once."""
    device: str = "auto"
    again: bool = False
    """Score anew what was scored before."""


@dataclass(frozen=True, slots=True)
class ScorerSettings:
    """What a scorer is made of."""

    options: ProbeOptions
    run: Run
    base: tuple[Path, ...]
    """The base model's files, where they were found; empty where they were not."""


class Scorer(Protocol):
    """Gives numbers to checkpoints; lower is better unless the person said otherwise."""

    name: ClassVar[str]
    parallel: ClassVar[bool]
    """Whether several checkpoints can be scored at once."""

    @classmethod
    def wanted(cls, options: ProbeOptions) -> bool:
        """Whether the options ask for this one."""

    def __init__(self, settings: ScorerSettings) -> None:
        """Get ready, without loading a model.

        Raises:
            LoraForensicsError: it cannot work for this run.
        """

    @property
    def identity(self) -> str:
        """Changes when the same checkpoint might get another score."""

    @property
    def what(self) -> str:
        """What it scores by, in words."""

    def score(self, checkpoint: Checkpoint) -> Sequence[float]:
        """One finite number, or one for each sample.

        Raises:
            ScoreError: this checkpoint gets none.
            LoraForensicsError: no checkpoint will.
        """

    def stop(self) -> None:
        """Give up what is still running, from another thread."""


def finite(values: Sequence[float]) -> tuple[float, ...]:
    """The values as they are.

    Raises:
        ScoreError: one is NaN or infinite.
    """
    if not np.isfinite(values).all():
        raise ScoreError("the score is not finite")
    return tuple(values)
