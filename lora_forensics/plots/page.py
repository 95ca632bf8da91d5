"""What all figures share: their style, their page, and the marks of the verdict."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lora_forensics.plots.names import drawable_text, elided, few_ticks
from lora_forensics.records import Verdict

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


BLUE, VERMILLION, GREEN, BLACK, GREY = "#0072B2", "#D55E00", "#009E73", "#000000", "#767676"
"""Colours of Okabe and Ito; every line differs in style or marker, too."""

CM = 1 / 2.54
WIDTH, LEFT, RIGHT, _MARGIN = 12.0, 1.75, 0.75, 0.3
_TITLE, _LINE, _GAP, PANEL, _BAR, _BELOW = 0.9, 0.52, 0.85, 3.4, 1.1, 1.25
"""Centimetres: title, a line of the legend, room above a panel, a panel, a colour bar with its numbers, room below."""
_TICKS = 0.5
"""And room for the numbers below a panel with an axis of its own."""
_DPI = 200

_KEEP_LINE: dict[str, Any] = {"color": GREEN, "linewidth": 1.5}
KEEP_MARK: dict[str, Any] = {"color": GREEN, "marker": "D", "markersize": 7, "markeredgecolor": "white"}
_POINT_LINE: dict[str, Any] = {"color": VERMILLION, "linewidth": 1.8, "linestyle": (0, (3, 1.5))}
HATCH = "//////"

_STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlepad": 5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.borderpad": 0,
    "legend.borderaxespad": 0,
    "legend.handlelength": 1.6,
    "legend.labelspacing": 0.3,
    "hatch.linewidth": 0.5,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "svg.hashsalt": "lora-forensics",
    "svg.fonttype": "path",
    "path.simplify": True,
}

NULL_LINE: dict[str, Any] = {"color": "#9a9a9a", "linewidth": 5, "solid_capstyle": "butt"}
SWEEP_LINE: dict[str, Any] = {"color": "#000000", "linestyle": "none", "marker": "|", "markersize": 7}
LAYER_LINE: dict[str, Any] = {"color": "#56b4e9", "linewidth": 2, "marker": "|", "markersize": 7}

_RESTS_ON = {
    "held_out_loss": "lowest held-out loss",
    "probe": "the probe",
    "turning_point": "second valley",
    "weights": "half of the way",
}
_NO_TURNING_POINT = {
    "unhealthy": "unhealthy adapter",
    "no_base_model": "no base model",
    "too_few_checkpoints": "too few checkpoints",
    "no_second_valley": "no second valley",
}


@contextmanager
def drawing() -> Iterator[None]:
    """Our style on top of matplotlib's defaults, whatever a person's own settings are, and only in here."""
    from matplotlib import style

    with style.context(["default", _STYLE]):
        yield


def stack(
    verdict: Verdict,
    heights: Sequence[float],
    sides: tuple[float, float] = (LEFT, RIGHT),
    bar: bool = False,
    hatched: bool = False,
    chance: bool = False,
    alone: int = 0,
) -> tuple[Figure, list[Axes]]:
    """A figure with its title, the meaning of its marks, and panels of the given heights in cm that share the steps.

    The first `alone` panels have an axis of their own.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    handles, texts = _meaning(verdict, hatched, chance)
    above = _TITLE + _LINE * len(texts)
    gap = _GAP + (_BAR if bar else 0.0)
    total = above + sum(heights) + gap * len(heights) + _BELOW + alone * _TICKS
    figure = Figure(figsize=(WIDTH * CM, total * CM))
    FigureCanvasAgg(figure)
    figure.text(_MARGIN / WIDTH, 1 - 0.2 / total, elided(verdict.run or ".", 38), fontsize=12, va="top", weight="bold")
    figure.legend(handles, texts, loc="upper left", bbox_to_anchor=(_MARGIN / WIDTH, 1 - _TITLE / total))
    panels: list[Axes] = []
    bottom = total - above
    for number, height in enumerate(heights):
        bottom -= gap + height + (_TICKS if 0 < number <= alone else 0.0)
        box = (sides[0] / WIDTH, bottom / total, 1 - sum(sides) / WIDTH, height / total)
        panels.append(figure.add_axes(box, sharex=panels[alone] if len(panels) > alone else None))
    for axes in panels[alone:-1]:
        axes.tick_params(labelbottom=False)
    panels[-1].set_xlabel(verdict.step_unit)
    panels[-1].xaxis.set_major_locator(few_ticks(5, integer=True))
    return figure, panels


def _meaning(verdict: Verdict, hatched: bool, chance: bool) -> tuple[list[Artist], list[str]]:
    """Handles and words for the marks."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    point, keep = verdict.turning_point, verdict.keep
    handles: list[Artist] = [Line2D([], [], linestyle="none"), Line2D([], [], linestyle="none")]
    texts = [f"no turning point: {_NO_TURNING_POINT.get(verdict.status, 'none found')}", "kept: no answer"]
    if point is not None:
        handles[0] = Line2D([], [], **_POINT_LINE)
        texts[0] = f"turning point: {verdict.step_unit} {point.step}, computed up to {point.support_end_step}"
    if keep is not None:
        handles[1] = Line2D([], [], **{**_KEEP_LINE, **KEEP_MARK})
        reason = _RESTS_ON.get(keep.rests_on, drawable_text(keep.rests_on))
        texts[1] = f"kept: {verdict.step_unit} {keep.step}, {reason}"
    if chance and null_band(verdict):
        handles.append(Line2D([], [], **NULL_LINE))
        texts.append("95 % of random walks turn here")
    if chance and layer_interval(verdict):
        handles.append(Line2D([], [], **LAYER_LINE))
        texts.append("turning point with other modules (90 %)")
    if chance and window_sweep(verdict):
        handles.append(Line2D([], [], **SWEEP_LINE))
        texts.append("turning point at other windows")
    if hatched:
        handles.append(Patch(facecolor="white", edgecolor=GREY, hatch=HATCH))
        texts.append("undefined")
    return handles, texts


def null_band(verdict: Verdict) -> tuple[float, float] | None:
    """Where random walks turn, in steps."""
    band = verdict.evidence.get("null_band")
    return (band[0], band[1]) if isinstance(band, list | tuple) and len(band) == 2 else None


def layer_interval(verdict: Verdict) -> tuple[float, float] | None:
    """Where other modules put the turning point, in steps."""
    interval = verdict.evidence.get("layer_interval")
    return (interval["low_step"], interval["high_step"]) if isinstance(interval, dict) else None


def window_sweep(verdict: Verdict) -> list[float]:
    """Where other windows put the turning point, in steps."""
    sweep = verdict.evidence.get("window_sweep")
    found = [entry for entry in sweep if isinstance(entry, dict)] if isinstance(sweep, list) else []
    steps = [entry.get("step") for entry in found if entry.get("window") != verdict.window]
    return [step for step in steps if isinstance(step, int)]


def marks(panels: Sequence[Axes], verdict: Verdict, over_map: bool = False) -> None:
    """The turning point, the checkpoints that it rests on, and the checkpoint to keep, as lines in all panels."""
    from matplotlib.patheffects import Normal, Stroke

    casing = [Stroke(linewidth=3.5, foreground="white"), Normal()] if over_map else None
    point, keep = verdict.turning_point, verdict.keep
    for axes in panels:
        if not axes.has_data():  # a sentence stands there
            continue
        if keep is not None:
            axes.axvline(keep.step, **_KEEP_LINE, path_effects=casing, zorder=2.1, gid="keep")
        if keep is not None and over_map:
            above = axes.get_xaxis_transform()
            axes.plot(keep.step, 1, transform=above, clip_on=False, linestyle="none", **KEEP_MARK, gid="kept")
        if point is not None:
            axes.axvline(point.step, **_POINT_LINE, path_effects=casing, zorder=2.2, gid="turning-point")
        if point is not None and not over_map:
            axes.axvspan(point.step, point.support_end_step, color="#e0e0e0", linewidth=0, zorder=0.4, gid="support")


def sentence(axes: Axes, text: str) -> None:
    """A sentence in place of missing data."""
    lines = textwrap.wrap(drawable_text(text), 46, max_lines=5, break_on_hyphens=False, placeholder=" …")
    axes.text(0.5, 0.5, "\n".join(lines), transform=axes.transAxes, ha="center", va="center", gid="sentence")
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)


def draw(figure: Figure, name: str) -> dict[str, bytes]:
    """A figure as PNG and SVG: file name to bytes."""
    # Software and dates in the files would change their bytes from day to day.
    formats: dict[str, dict[str, str | None]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    files = {}
    for kind, metadata in formats.items():
        drawn = io.BytesIO()
        with drawing():
            figure.savefig(drawn, format=kind, dpi=_DPI, metadata=metadata)
        files[f"{name}.{kind}"] = drawn.getvalue()
    return files
