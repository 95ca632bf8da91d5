"""A short way to certainty: score a few checkpoints, by a command or on held-out samples, and keep the best of them.

Adding a scorer: one file with a class after `interface.Scorer`, and one line in `SCORERS`.
"""

from __future__ import annotations

from lora_forensics.probe.command import CommandScorer
from lora_forensics.probe.diffusion import DiffusionScorer
from lora_forensics.probe.interface import ProbeOptions, Scorer
from lora_forensics.probe.language_model import LanguageModelScorer

__all__ = ["SCORERS", "ProbeOptions", "Scorer"]

SCORERS: tuple[type[Scorer], ...] = (CommandScorer, LanguageModelScorer, DiffusionScorer)
"""Every scorer; the options say which is wanted."""
