"""A comparison as a figure: one panel a measure, one line a run."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

import polars as pl

from lora_forensics.comparison.text import letters
from lora_forensics.comparison.values import MEASURES, Comparison, values_of
from lora_forensics.plots.lines import log_axis
from lora_forensics.plots.names import drawable_text, elided
from lora_forensics.plots.page import CM, draw, drawing
from lora_forensics.plots.scales import log_floor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
"""Seven colours and five dashes: 35 runs before a look comes again."""
_WIDTH, _LEFT, _RIGHT, _TOP, _PANEL, _GAP, _BELOW, _LINE = 16.0, 1.9, 0.5, 0.4, 4.0, 1.1, 1.4, 0.46
"""Centimetres."""
_NAMED = 24
"""Runs that the legend names."""


def comparison_figure(found: Comparison) -> Figure:
    """Every measure along the axis; a diamond stands at the checkpoint that each run keeps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    looks = [(color, line) for line in _LINES for color in _COLORS]
    shown = list(zip(letters(len(found.runs)), found.runs, cycle(looks)))
    measures = found.measures or ("cosine",)
    legend = min(len(shown), _NAMED) + (len(shown) > _NAMED) + 1
    total = _TOP + _LINE * legend + (_PANEL + _GAP) * len(measures) + _BELOW
    with drawing():
        figure = Figure(figsize=(_WIDTH * CM, total * CM))
        FigureCanvasAgg(figure)
        bottom = total - _TOP - _LINE * legend
        first = None
        for measure in measures:
            bottom -= _GAP + _PANEL
            box = (_LEFT / _WIDTH, bottom / total, 1 - (_LEFT + _RIGHT) / _WIDTH, _PANEL / total)
            axes = figure.add_axes(box, sharex=first)
            first = first or axes
            note = found.notes.get(measure, "").partition(":")[0]
            axes.set_title(elided(f"{MEASURES[measure]}: {note}" if note else MEASURES[measure], 100))
            axes.tick_params(labelbottom=measure == measures[-1])
            for letter, run, (color, line) in shown:
                known = run.course.filter(pl.col(found.align).is_not_null() & pl.col(measure).is_finite())
                x, y = known[found.align].to_numpy(), known[measure].to_numpy()
                axes.plot(
                    x, y, color=color, linestyle=line, marker="." if len(x) == 1 else "", gid=f"{measure}-{letter}"
                )
                kept = run.kept()
                if kept and kept[found.align] is not None and kept[measure] is not None:
                    at = kept[found.align], kept[measure]
                    axes.plot(*at, "D", color=color, markersize=7, markeredgecolor="white", zorder=5)
            floor = log_floor(values_of(measure, found.runs)) if measure in found.measures else None
            if floor is not None:
                log_axis(axes, floor)
            if not axes.has_data():
                axes.text(0.5, 0.5, "nothing is known", transform=axes.transAxes, ha="center", va="center")
        axes.set_xlabel({"dose": "dose (sum of the learning rates)"}.get(found.align, found.align))
        handles = [Line2D([], [], color=color, linestyle=line) for _, _, (color, line) in shown[:_NAMED]]
        texts = [f"{letter}  {elided(drawable_text(run.name), 60)}" for letter, run, _ in shown[:_NAMED]]
        if len(shown) > _NAMED:
            handles.append(Line2D([], [], linestyle="none"))
            texts.append(f"and {len(shown) - _NAMED} more")
        handles.append(
            Line2D([], [], linestyle="none", marker="D", color="#767676", markeredgecolor="white", markersize=7)
        )
        texts.append("kept")
        figure.legend(
            handles, texts, loc="upper left", bbox_to_anchor=(0.3 / _WIDTH, 1 - 0.3 / total), handlelength=2.6
        )
    return figure


def draw_comparison(found: Comparison) -> dict[str, bytes]:
    """The figure as PNG and SVG, by file name."""
    return draw(comparison_figure(found), "comparison")
