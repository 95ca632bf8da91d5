"""The similarity figure: CS, CS-Fluctuation and losses over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from lora_forensics.plots.names import Floats, points, power_of_ten, raised, times
from lora_forensics.plots.page import (
    BLACK,
    BLUE,
    KEEP_MARK,
    LAYER_LINE,
    NULL_LINE,
    PANEL,
    SWEEP_LINE,
    drawing,
    layer_interval,
    marks,
    null_band,
    sentence,
    stack,
    window_sweep,
)
from lora_forensics.plots.scales import log_floor
from lora_forensics.records import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_NUMBERED_VALLEYS = 5
_COLLISION = 0.035
"""Part of the width that two numbers need between them."""


@dataclass(frozen=True, slots=True)
class Look:
    """How a line is drawn."""

    color: str
    line: str
    marker: str
    markers_up_to: int = 80
    """Points up to which each has a marker of its own."""


_LOSSES = {
    "held_out_loss": (Look(BLUE, "-", "o"), "held-out"),
    "train_loss": (Look(BLACK, ":", "s", 12), "training"),
}


def similarity_figure(series: pl.DataFrame, checkpoints: pl.DataFrame, verdict: Verdict) -> Figure:
    """CS, CS-Fluctuation with its valleys, and the losses where there are any, over the steps.

    Args:
        series: columns of `series.SERIES_COLUMNS`, any of which may be missing or null.
        checkpoints: `held_out_loss` and `train_loss` by `step`.
        verdict: its turning point, the checkpoints that this rests on, and the checkpoint to keep are marked.
    """
    losses = [name for name in ("held_out_loss", "train_loss") if np.isfinite(points(checkpoints, name)[1]).any()]
    with drawing():
        figure, panels = stack(verdict, [PANEL] * (3 if losses else 2), chance=True)
        _similarity_panel(panels[0], series, verdict)
        _fluctuation_panel(panels[1], series, verdict)
        if losses:
            _loss_panel(panels[2], checkpoints, losses, verdict)
        steps = np.concatenate([points(series, "cosine")[0], points(checkpoints, "step")[0]])
        if steps.size:
            room = 0.03 * float(np.ptp(steps)) or 0.5
            panels[-1].set_xlim(steps.min() - room, steps.max() + room)
        else:
            panels[-1].set_xticks([])
        marks(panels, verdict)
    return figure


def _similarity_panel(axes: Axes, series: pl.DataFrame, verdict: Verdict) -> None:
    rowwise = verdict.similarity == "rowwise"
    steps, cosine = points(series, "cosine_rowwise" if rowwise else "cosine")
    power = power_of_ten(cosine)
    axes.set_title(f"{'row-wise cosine' if rowwise else 'cosine'} similarity (CS){times(power)}")
    if not np.isfinite(cosine).any():
        return sentence(axes, verdict.message or "No checkpoint has a cosine.")
    _line(axes, steps, cosine / 10.0**power, Look(BLUE, "-", "."), "cs")
    return _kept(axes, steps, cosine / 10.0**power, verdict)


def _fluctuation_panel(axes: Axes, series: pl.DataFrame, verdict: Verdict) -> None:
    steps, value = points(series, "cs_fluctuation")
    positive = value[value > 0]
    floor = log_floor(positive.tolist())
    power = power_of_ten(value) if floor is None else 0
    window = f", window {verdict.window} checkpoints" if verdict.window is not None else ""
    axes.set_title(f"CS-Fluctuation{window}{times(power)}")
    if not np.isfinite(value).any():
        few = verdict.message if verdict.status == "too_few_checkpoints" else ""
        sentence(axes, few or "No CS-Fluctuation: too few checkpoints in a row have a cosine.")
        return
    axes.margins(y=0.3)
    _line(axes, steps, value / 10.0**power, Look(BLACK, "-", "."), "cs-fluctuation")
    if floor is not None:
        log_axis(axes, floor)
    _valleys(axes, steps, value / 10.0**power, points(series, "valley")[1])
    _chance(axes, verdict)


def _chance(axes: Axes, verdict: Verdict) -> None:
    """Where random walks, other modules and other windows turn, along the bottom."""
    along = axes.get_xaxis_transform()
    for gid, span, height, look in (
        ("null-band", null_band(verdict), 0.035, NULL_LINE),
        ("layer-interval", layer_interval(verdict), 0.11, LAYER_LINE),
    ):
        if span is not None:
            axes.plot(span, (height, height), transform=along, zorder=3, gid=gid, **look)
    steps = window_sweep(verdict)
    axes.plot(steps, [0.185] * len(steps), transform=along, zorder=3, gid="window-sweep", **SWEEP_LINE)


def _valleys(axes: Axes, steps: Floats, value: Floats, order: Floats) -> None:
    """Mark all valleys, and number the first few, the second first, where the numbers do not collide."""
    from matplotlib.patheffects import withStroke

    here = np.isfinite(order) & np.isfinite(value)
    size = 7 if np.count_nonzero(here) <= 30 else 4
    axes.plot(steps[here], value[here], "v", color=BLACK, ms=size, mfc="white", mew=1.1, zorder=4, gid="valleys")
    reach = _COLLISION * float(np.ptp(steps))
    outline = [withStroke(linewidth=3, foreground="white")]
    look: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "top", "zorder": 6}
    taken: list[float] = []
    for wanted in (2, 1, *range(3, _NUMBERED_VALLEYS + 1)):
        for x, y in zip(steps[order == wanted], value[order == wanted], strict=True):
            if all(abs(x - other) >= reach for other in taken):
                axes.annotate(f"{wanted}", (x, y), (0, -6), path_effects=outline, **look)
                taken.append(x)


def _loss_panel(axes: Axes, checkpoints: pl.DataFrame, losses: Sequence[str], verdict: Verdict) -> None:
    axes.set_title("loss")
    for name in losses:
        steps, loss = points(checkpoints, name)
        known = np.isfinite(loss)  # evaluated at some checkpoints only: the line joins those
        _line(axes, steps[known], loss[known], *_LOSSES[name])
        if name == "held_out_loss":
            _kept(axes, steps, loss, verdict)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1.03), ncols=2, columnspacing=1.2)


def _line(axes: Axes, steps: Floats, value: Floats, look: Look, gid: str) -> None:
    """A line, with a marker at each checkpoint while these can be told apart; a lone value is a marker."""
    marker = look.marker if steps.size <= look.markers_up_to else ""
    size = 6 if marker == "." else 3.5
    axes.plot(steps, value, look.line, color=look.color, marker=marker, ms=size, gid=gid, label=gid)


def _kept(axes: Axes, steps: Floats, value: Floats, verdict: Verdict) -> None:
    if verdict.keep is not None:
        here = steps == verdict.keep.step
        axes.plot(steps[here], value[here], linestyle="none", **KEEP_MARK, zorder=5, gid="kept")


def log_axis(axes: Axes, floor: float) -> None:
    """A logarithmic axis with few ticks, whose labels do not need matplotlib's mathematics; it ends near the floor."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log", nonpositive="mask")
    if axes.get_ylim()[0] < floor / 10:
        axes.set_ylim(bottom=floor / 2)
    axes.yaxis.set_major_locator(LogLocator(numticks=5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"10{raised(round(math.log10(value)))}"))
    axes.yaxis.set_minor_locator(NullLocator())
