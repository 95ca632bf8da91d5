"""Analyses that cost more than the main pass: columns of layers.parquet that `--analysis NAME` fills.

A new one is a module with an `Analysis` and one line in `ANALYSES`.
"""

from __future__ import annotations

from lora_forensics.analyses.columns import columns
from lora_forensics.analyses.interface import Analysis
from lora_forensics.analyses.intruders import intruders
from lora_forensics.analyses.subspace import subspace

__all__ = ["ANALYSES", "ANALYSIS_COLUMNS", "Analysis"]

ANALYSES: dict[str, Analysis] = {analysis.name: analysis for analysis in (columns, intruders, subspace)}
"""Every analysis by its name, in the order of the columns."""

ANALYSIS_COLUMNS = tuple(column for analysis in ANALYSES.values() for column in analysis.columns)
"""Null unless their analysis was asked for, and without a base model."""
