"""The decomposition figure: magnitude against direction change of every module, and how their correlation goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from lora_forensics.plots.names import few_ticks, points, power_of_ten, times
from lora_forensics.plots.page import BLUE, PANEL, drawing, marks, sentence, stack
from lora_forensics.records import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHOWN = 6
"""Checkpoints whose modules are drawn: first, last, and some between."""


def decomposition_figure(series: pl.DataFrame, layers: pl.DataFrame, verdict: Verdict) -> Figure:
    """After Liu et al., DoRA, figure 2: a point for every module at a few checkpoints, dark to light as they follow.

    Below it the correlation over modules, and how straight the way was, over the steps.

    Args:
        series: `magnitude_direction` and `directness` by `step`.
        layers: `magnitude_change` and `direction_change` by `step` and `module`.
        verdict: its components are drawn; its checkpoint to keep is marked.
    """
    with drawing():
        figure, panels = stack(verdict, [PANEL, PANEL, PANEL], alone=1)
        _scatter(panels[0], layers, verdict)
        for axes, column, title, low in (
            (panels[1], "magnitude_direction", "correlation of the two over modules", -1.05),
            (panels[2], "directness", "length of the change / way that led to it", 0.0),
        ):
            steps, values = points(series, column)
            axes.set_title(title)
            if not np.isfinite(values).any():
                sentence(axes, "Not known without a base model and several modules.")
                continue
            axes.plot(steps, values, "-", color=BLUE, marker=".", ms=5, gid=column)
            axes.set_ylim(low, 1.05)
        marks(panels[1:], verdict)
    return figure


def _scatter(axes: Axes, layers: pl.DataFrame, verdict: Verdict) -> None:
    names = {"step", "magnitude_change", "direction_change"}
    known = layers if names <= set(layers.columns) else pl.DataFrame(schema=dict.fromkeys(names, pl.Float64))
    known = known.filter(pl.col("magnitude_change").is_finite() & pl.col("direction_change").is_finite())
    if verdict.components and "component" in known.columns:
        known = known.filter(pl.col("component").is_in(verdict.components))
    if known.is_empty():
        axes.set_title("magnitude change against direction change")
        sentence(axes, "Not known without a base model.")
        axes.set_xticks([])
        return
    steps = known["step"].unique().sort().to_numpy()
    chosen = steps[np.unique(np.linspace(0, steps.size - 1, min(_SHOWN, steps.size)).round().astype(int))]
    known = known.filter(pl.col("step").is_in(chosen.tolist())).sort("step")
    turned, grown = (known[name].to_numpy() for name in ("direction_change", "magnitude_change"))
    power = power_of_ten(turned)
    axes.scatter(
        turned / 10.0**power, grown, c=known["step"].to_numpy(), cmap="cividis", s=9, linewidths=0, gid="modules"
    )
    axes.set_title(f"magnitude change of modules, {verdict.step_unit}s {chosen[0]} (dark) to {chosen[-1]}")
    axes.text(0.99, 0.04, f"direction change{times(power)} \u2192", transform=axes.transAxes, ha="right")
    axes.xaxis.set_major_locator(few_ticks(5))
