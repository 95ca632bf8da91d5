"""Figures of one run: similarity over the steps, a heat map of all modules, magnitude against direction.

Figures are 12 cm wide with type of 10.5 points or more, so that at 8 cm nothing is smaller than 7 points. They are
built on matplotlib's objects, without pyplot and without touching global settings; matplotlib is imported when the
first figure is drawn. Every figure is drawn, however little there is to show: a sentence stands where data is missing.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from lora_forensics.plots.decomposition import decomposition_figure
from lora_forensics.plots.heatmap import modules_figure
from lora_forensics.plots.lines import similarity_figure
from lora_forensics.plots.page import draw
from lora_forensics.records import Verdict
from lora_forensics.series import write_bytes

__all__ = ["decomposition_figure", "draw_plots", "modules_figure", "save_plots", "similarity_figure"]


def draw_plots(
    series: pl.DataFrame, layers: pl.DataFrame, checkpoints: pl.DataFrame, verdict: Verdict
) -> dict[str, bytes]:
    """All figures as PNG and SVG, by file name; the same data gives the same bytes."""
    column = "cosine_rowwise" if verdict.similarity == "rowwise" and "cosine_rowwise" in layers.columns else "cosine"
    lines = similarity_figure(series, checkpoints, verdict)
    points = decomposition_figure(series, layers, verdict)
    maps = modules_figure(layers, verdict, column)
    return draw(lines, "similarity") | draw(maps, "modules") | draw(points, "decomposition")


def save_plots(
    folder: Path, series: pl.DataFrame, layers: pl.DataFrame, checkpoints: pl.DataFrame, verdict: Verdict
) -> list[Path]:
    """Write all figures as PNG and SVG into a folder, whole or not at all.

    Raises:
        SeriesError: the folder cannot be written.
    """
    drawn = draw_plots(series, layers, checkpoints, verdict)
    for name, content in drawn.items():
        write_bytes(folder / name, content)
    return [folder / name for name in drawn]
