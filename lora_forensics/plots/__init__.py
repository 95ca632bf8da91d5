"""Figures of one run: similarity over the steps, and a heat map of all modules.

Figures are 12 cm wide with type of 10.5 points or more, so that at 8 cm nothing is smaller than 7 points. They are
built on matplotlib's objects, without pyplot and without touching global settings; matplotlib is imported when the
first figure is drawn. Every figure is drawn, however little there is to show: a sentence stands where data is missing.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from lora_forensics.plots.heatmap import modules_figure
from lora_forensics.plots.lines import similarity_figure
from lora_forensics.plots.page import save
from lora_forensics.records import Verdict

__all__ = ["modules_figure", "save_plots", "similarity_figure"]


def save_plots(
    folder: Path, series: pl.DataFrame, layers: pl.DataFrame, checkpoints: pl.DataFrame, verdict: Verdict
) -> list[Path]:
    """Write both figures as PNG and SVG into a folder; the same data gives the same bytes.

    Raises:
        SeriesError: the folder cannot be written.
    """
    column = "cosine_rowwise" if verdict.similarity == "rowwise" and "cosine_rowwise" in layers.columns else "cosine"
    written = save(similarity_figure(series, checkpoints, verdict), folder / "similarity")
    return written + save(modules_figure(layers, verdict, column), folder / "modules")
