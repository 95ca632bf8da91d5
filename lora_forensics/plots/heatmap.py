"""The modules figure: one metric as a heat map, module x step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from lora_forensics.plots.names import (
    ROW_LABELS,
    Floats,
    Row,
    drawable_text,
    elided,
    few_ticks,
    model_order,
    power_of_ten,
    row_labels,
    spans,
    times,
)
from lora_forensics.plots.page import CM, GREY, HATCH, LEFT, PANEL, RIGHT, drawing, marks, sentence, stack
from lora_forensics.records import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


_COLUMNS = 600
"""Samples across a heat map: 10,000 checkpoints cost no more than 600."""

_QUANTITIES = {
    "cosine": "cosine to the frozen weight",
    "cosine_rowwise": "row-wise cosine to the frozen weight",
    "delta_norm": "norm of the change",
    "relative_norm": "norm of the change / norm of the weight",
    "step_size": "movement since the checkpoint before",
    "rotation": "rotation since the checkpoint before",
}


def modules_figure(layers: pl.DataFrame, verdict: Verdict, column: str = "cosine") -> Figure:
    """A heat map, module x step, of one column of layers.parquet; undefined values are hatched.

    Colours run from dark to light with grey at 0 for cosines, so that they also read in grey; the outermost 2 % of the
    values share the last colour.
    """
    rows, steps, matrix = _matrix(layers, column)
    labels = row_labels(rows)
    with drawing():
        defined = bool(np.isfinite(matrix).any())
        height = _map_height(len(rows)) if defined else PANEL
        several = len({component for component, _ in rows}) > 1
        widest = max(map(len, labels), default=0) if defined else 0
        sides = (max(LEFT, 0.215 * widest + 0.6), RIGHT + 0.55 * several)
        figure, (axes,) = stack(verdict, [height], sides, bar=defined, hatched=defined and bool(np.isnan(matrix).any()))
        if defined:
            image, title, beyond = _heat_map(axes, matrix, steps, column)
            _colour_bar(figure, axes, image, title, beyond)
            _name_rows(axes, rows, labels, height)
            marks([axes], verdict, over_map=True)
        else:
            sentence(axes, verdict.message or "No module has a value to show.")
            axes.set_xticks([])
    return figure


def _heat_map(axes: Axes, matrix: Floats, steps: Floats, column: str) -> tuple[AxesImage, str, tuple[bool, bool]]:
    """The columns sampled on an even grid of steps, as one picture; its title, and at which ends values go beyond."""
    middles = (steps[1:] + steps[:-1]) / 2
    first, last = (steps[0] - middles[0], steps[-1] - middles[-1]) if middles.size else (-0.5, 0.5)
    start, stop = float(steps[0] + first), float(steps[-1] + last)
    low, high = _limits(matrix, centred=column.startswith("cosine"))
    power = power_of_ten(np.array([low, high]))
    scaled, low, high = matrix / 10.0**power, low / 10.0**power, high / 10.0**power
    axes.patch.set(hatch=HATCH, facecolor="white", edgecolor=GREY)
    axes.grid(visible=False)
    image = axes.imshow(
        scaled[:, np.searchsorted(middles, np.linspace(start, stop, 2 * _COLUMNS + 1)[1::2])],
        cmap="cividis",
        vmin=low,
        vmax=high,
        aspect="auto",
        interpolation="nearest",
        extent=(start, stop, len(matrix) - 0.5, -0.5),
    )
    title = _QUANTITIES.get(column, drawable_text(column.replace("_", " "))) + times(power)
    finite = scaled[np.isfinite(scaled)]
    return image, title, (bool(finite.min() < low), bool(finite.max() > high))


def _colour_bar(figure: Figure, axes: Axes, image: AxesImage, title: str, beyond: tuple[bool, bool]) -> None:
    """A bar above the map, with an arrow at an end that values go beyond."""
    box, cm = axes.get_position(), CM / figure.get_figheight()
    place = figure.add_axes((box.x0, box.y1 + 0.8 * cm, box.width, 0.3 * cm))
    extend = ("neither", "max", "min", "both")[2 * beyond[0] + beyond[1]]
    bar = figure.colorbar(image, cax=place, orientation="horizontal", extend=extend, ticks=few_ticks(5))
    bar.outline.set_linewidth(0.6)
    place.set_title(title, loc="right")  # a long title grows over the row labels, where there is room


def _limits(values: Floats, centred: bool) -> tuple[float, float]:
    """Limits of the colours that a few wild values cannot move."""
    finite = values[np.isfinite(values)]
    if centred:
        high = float(np.percentile(np.abs(finite), 98)) or float(np.abs(finite).max()) or 1.0
        return -high, high
    low, high = (float(limit) for limit in np.percentile(finite, [2, 98]))
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _map_height(rows: int) -> float:
    return 0.5 * rows + 0.5 if rows <= ROW_LABELS else float(np.clip(0.06 * rows, 10, 15))


def _name_rows(axes: Axes, rows: Sequence[Row], labels: Sequence[str], height: float) -> None:
    """Label each block once, as densely as the type allows, and each component beside the map."""
    each = height / len(rows)
    blocks = spans([(component, label) for (component, _), label in zip(rows, labels, strict=True)])
    ticks: dict[float, str] = {}
    for start, stop in blocks:
        centre = (start + stop - 1) / 2
        if not ticks or (centre - max(ticks)) * each >= 0.46:
            ticks[centre] = labels[start]
    axes.set_yticks(list(ticks), list(ticks.values()))
    if len(blocks) < len(rows):
        axes.set_yticks([start - 0.5 for start, _ in blocks], minor=True)
    axes.tick_params(axis="y", which="major", length=0, pad=8)
    axes.tick_params(axis="y", which="minor", length=5 if each * len(rows) / len(blocks) > 0.15 else 0, width=0.6)
    components = spans([component for component, _ in rows])
    for start, stop in components if len(components) > 1 else ():
        name = elided(rows[start][0].replace("_", " "), 20)
        axes.axhline(start - 0.5, color="white", linewidth=2.5 if start else 0)
        if (stop - start) * each > 0.22 * len(name):
            middle = 1 - (start + stop) / 2 / len(rows)
            axes.text(1.02, middle, name, transform=axes.transAxes, rotation=270, va="center", ha="left")


def _matrix(layers: pl.DataFrame, column: str) -> tuple[list[Row], Floats, Floats]:
    """Modules in model order, steps ascending, and their values: shape (modules, steps)."""
    if not {"step", "module", column} <= set(layers.columns):
        return [], np.empty(0), np.empty((0, 0))
    component = pl.col("component") if "component" in layers.columns else pl.lit("", pl.String)
    value = pl.col(column).cast(pl.Float64, strict=False).fill_null(np.nan)
    cells = layers.select("step", "module", component.fill_null("").alias("component"), value.alias("value"))
    cells = cells.drop_nulls(["step", "module"])
    rows: list[Row] = sorted(cells.select("component", "module").unique().rows(), key=model_order)
    steps = cells["step"].unique().sort().to_numpy().astype(np.float64)
    numbers = pl.DataFrame(rows, schema={"component": pl.String, "module": pl.String}, orient="row").with_row_index(
        "row"
    )
    cells = cells.join(numbers, on=["component", "module"])
    matrix = np.full((len(rows), steps.size), np.nan)
    matrix[cells["row"].to_numpy(), np.searchsorted(steps, cells["step"].to_numpy())] = cells["value"].to_numpy()
    return rows, steps, matrix
