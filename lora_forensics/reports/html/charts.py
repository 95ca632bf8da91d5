"""Charts as Vega-Lite specifications: constants and numbers only, all text of files stays in the data.

Colours are CSS variables, so that one drawing serves both themes and paper. `picked`, `hover`, `low` and `high` are set
by charts.js in all charts at once, `ink` in the heat map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from lora_forensics.plots.page import layer_interval, null_band, window_sweep
from lora_forensics.plots.scales import below, log_floor
from lora_forensics.records import Verdict
from lora_forensics.reports.html.data import Lines, better
from lora_forensics.reports.text import number

Spec = dict[str, Any]

_FORMAT = {"format": ".3~g"}
_INK: Spec = {"expr": "ink"}
"""The quiet colour of the theme, which charts.js tells the heat map: a canvas knows no CSS."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart."""

    column: str
    label: str
    color: str = "var(--line)"
    dash: tuple[int, int] | None = None
    band: bool = False
    """With the columns `.low` and `.high` as a band around `.mid`."""

    @property
    def middle(self) -> str:
        """The column that the line itself shows."""
        return f"{self.column}.mid" if self.band else self.column


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart of a page."""

    name: str
    title: str
    lines: tuple[Line, ...]
    note: str = ""
    """How to read it."""
    extra: tuple[Spec, ...] = field(default=())
    """Layers below the lines."""
    over: tuple[Spec, ...] = field(default=())
    wide: bool = False
    """Values may span decades: then the scale is logarithmic."""
    height: int = 190

    def known(self, table: Lines) -> tuple[Line, ...]:
        """Lines that have at least two values."""
        return tuple(line for line in self.lines if sum(v is not None for v in table.get(line.middle, ())) > 1)

    def spec(self, table: Lines, verdict: Verdict) -> Spec:
        """The specification."""
        shown, values = self.known(table), self._values(table)
        floor = log_floor(values) if self.wide else None
        y: Spec = {"scale": {"zero": False, "nice": True}, "axis": _axis(values)}
        if floor is not None:
            powers = range(math.floor(math.log10(floor)), math.ceil(math.log10(max(values))) + 1)
            axis = {"values": [10.0**power for power in powers[:: len(powers) // 6 + 1]], "format": "~e"}
            end = {"domainMin": floor, "clamp": True} if floor > min(values) else {}
            y = {"scale": {"type": "log", **end}, "axis": axis}
        layers = [*self.extra, cursor("picked", "var(--ink)", 7, 0.16), *_marks(verdict)]
        for line in shown:
            layers += _line(line, y)
        return chart([*layers, *self.over, cursor("hover", "var(--quiet)")], self.height)

    def caption(self, table: Lines) -> str:
        """How to read it, and what lies on the edge of its axis."""
        return self.note + (below(self._values(table)) if self.wide else "")

    def _values(self, table: Lines) -> list[float]:
        return [v for line in self.known(table) for v in table[line.middle] if v is not None]

    def described(self, table: Lines, verdict: Verdict) -> str:
        """What the lines do, in words, for those who do not see them."""
        said = [_told(line, table, verdict) for line in self.known(table)]
        return "; ".join(said) + "." if said else ""


def charts(verdict: Verdict) -> list[Chart]:
    """All charts over the steps."""
    unit = verdict.step_unit
    cosine = "cosine_rowwise" if verdict.similarity == "rowwise" else "cosine"
    return [
        Chart(
            "cs",
            "Cosine similarity to the base (CS)",
            (Line(cosine, "CS"),),
            "Mean over modules of the cosine between the change and the frozen weight.",
        ),
        Chart(
            "fluctuation",
            "CS-Fluctuation" + (f", window {verdict.window}" if verdict.window else ""),
            (Line("cs_fluctuation", "CS-Fluctuation"),),
            "Triangles are valleys; the paper's turning point is the second. Grey ground: where 95 % of random walks "
            "turn. Bar: with other modules (90 %). Ticks: at other windows. A value rests on the checkpoints after it, "
            "so the last ones have none.",
            extra=_chance(verdict),
            over=_valleys(),
            wide=True,
        ),
        Chart(
            "loss",
            "Loss",
            (
                Line("held_out_loss", "held-out loss", "var(--line)"),
                Line("train_loss", "training loss", "var(--quiet)", (4, 3)),
            ),
            "As the trainer logged it. Solid: held-out; dashed: training.",
        ),
        Chart(
            "probe",
            "Probe score",
            (Line("probe_score", "score"),),
            f"Of the checkpoints that were scored; {better(verdict)} is better.",
        ),
        Chart(
            "norm",
            "Size and movement",
            (
                Line("relative_norm", "change / weight", "var(--line)", band=True),
                Line("step_size", "movement since the last", "var(--second)", (4, 3), band=True),
            ),
            f"Median over modules, band from the lowest to the highest tenth, at each {unit}. "
            "Solid: norm of the change over that of the weight; dashed: distance to the checkpoint before.",
            wide=True,
        ),
        Chart(
            "rank",
            "Effective and stable rank",
            (
                Line("effective_rank", "effective rank", "var(--line)", band=True),
                Line("stable_rank", "stable rank", "var(--second)", (4, 3), band=True),
            ),
            "How many directions the change uses. Solid: effective; dashed: stable. Median and tenths over modules.",
        ),
        Chart(
            "sigma",
            "Largest singular value",
            (Line("spectral_norm", "largest singular value", "var(--line)", band=True),),
            "Of the change; growth of a few modules alone makes an adapter hard to combine. Median and tenths.",
            wide=True,
        ),
        Chart(
            "course",
            "Straightness and decomposition",
            (
                Line("directness", "directness", "var(--line)"),
                Line("magnitude_direction", "correlation", "var(--second)", (4, 3)),
            ),
            "Solid: length of the change over the way to it (1 = a straight line); dashed: correlation over modules of "
            "magnitude and direction change.",
        ),
    ]


def others(verdict: Verdict) -> list[int]:
    """Steps of candidates that are neither kept nor the turning point."""
    shown = {point.step for point in (verdict.keep, verdict.turning_point) if point is not None}
    return sorted({candidate.step for candidate in verdict.candidates} - shown)


def column_chart() -> Spec:
    """The median and tenths of the column that is chosen; charts.js fills `v.low`, `v.mid` and `v.high` of `chosen`."""
    layers = _line(Line("v", "", band=True), {"scale": {"zero": False}, "axis": _FORMAT})
    cursors = [cursor("picked", "var(--ink)", 7, 0.16), cursor("hover", "var(--quiet)")]
    return chart([*cursors, *layers], 150, data="chosen")


def map_chart(rows: int) -> Spec:
    """The heat map, module x step; charts.js gives cells and labels, and the ends of the colours."""
    x: Spec = {**_x(), "scale": _span()}
    down: Spec = {"type": "quantitative", "scale": {"domain": [0, rows], "reverse": True, "nice": False}, "axis": None}
    cell: Spec = {
        "data": {"name": "cells"},
        "mark": {"type": "rect", "clip": True, "tooltip": {"content": "data"}},
        "encoding": {
            "x": {"field": "from", "type": "quantitative", **x},
            "x2": {"field": "to"},
            "y": {"field": "row", **down},
            "y2": {"field": "below"},
            "color": {
                "field": "v",
                "type": "quantitative",
                "scale": {"scheme": "cividis", "domain": [0, 1], "clamp": True, "nice": False},
                "legend": {"title": None, "gradientLength": 160, "orient": "top", "direction": "horizontal", **_FORMAT},
            },
        },
    }
    label: Spec = {
        "data": {"name": "labels"},
        "mark": {"type": "text", "align": "right", "baseline": "top", "dx": -6, "fontSize": 10, "color": _INK},
        "encoding": {
            "x": {"value": 0},
            "y": {"field": "row", **down},
            "text": {"field": "label", "type": "nominal"},
        },
    }
    spec = chart(
        [cell, label, cursor("hover", _INK), cursor("picked", "#ff3b30")],
        max(140, min(520, 14 * rows if rows <= 24 else 4 * rows)),
    )
    gray = dict.fromkeys(("labelColor", "titleColor", "domainColor", "tickColor"), _INK)
    spec["config"] = {**spec["config"], "axis": {**spec["config"]["axis"], **gray, "grid": False}, "legend": gray}
    spec["params"].append({"name": "ink", "value": "#808080"})
    spec["padding"] = {"left": 96, "right": 6, "top": 2, "bottom": 2}
    return spec


def cloud_chart() -> Spec:
    """Magnitude against direction change; the modules of the step nearest to the picked one stand out."""
    axes = {
        "x": {"field": "x", "type": "quantitative", "title": "direction change", "axis": _FORMAT},
        "y": {"field": "y", "type": "quantitative", "title": "magnitude change", "axis": _FORMAT},
    }
    everyone: Spec = {
        "mark": {"type": "circle", "size": 9, "color": "var(--quiet)", "opacity": 0.25},
        "encoding": axes,
    }
    here: Spec = {
        "transform": [{"filter": "datum.step === near"}],
        "mark": {"type": "circle", "size": 28, "color": "var(--line)", "opacity": 0.9, "tooltip": {"content": "data"}},
        "encoding": axes,
    }
    spec = chart([everyone, here], 220, data="cloud")
    spec["params"].append({"name": "near", "value": -1})
    return spec


def chart(layers: list[Spec], height: int, data: str = "table") -> Spec:
    """A chart as wide as its place, without background, that reads one data set by name."""
    quiet = {"labelColor": "var(--quiet)", "titleColor": "var(--quiet)", "titleFontWeight": "normal"}
    lines = {"domainColor": "var(--rule)", "tickColor": "var(--rule)", "gridColor": "var(--grid)"}
    font = "system-ui, sans-serif"
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": "container",
        "height": height,
        "background": None,
        "padding": {"left": 2, "right": 6, "top": 6, "bottom": 2},
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"name": data},
        "params": [{"name": name, "value": 0} for name in ("picked", "hover", "low", "high")],
        "layer": layers,
        "config": {
            "view": {"stroke": None},
            "font": font,
            "axis": {**quiet, **lines, "labelFontSize": 11, "titleFontSize": 11, "tickCount": 5, "titlePadding": 4},
        },
    }


def _x() -> Spec:
    return {"title": None, "axis": {"tickCount": 6, "grid": False, "format": "~d"}}


def _axis(values: list[float]) -> Spec:
    """Short numbers, however small."""
    return {"format": ".2~e"} if 0 < max(map(abs, values)) < 1e-3 else _FORMAT


def _span() -> Spec:
    ends = {"domainMin": {"expr": "low"}, "domainMax": {"expr": "high"}}
    return {**ends, "zero": False, "nice": False}


def _step(name: str = "step") -> Spec:
    return {"field": name, "type": "quantitative", **_x(), "scale": _span()}


def _line(line: Line, y: Spec) -> list[Spec]:
    """A line with a point at each checkpoint, over its band."""
    shape: Spec = {"type": "line", "color": line.color, "strokeWidth": 1.5, "clip": True}
    if line.dash:
        shape["strokeDash"] = list(line.dash)
    field = line.middle.replace(".", "\\.")
    here: Spec = {"field": field, "type": "quantitative", "title": None, **y}
    known = [{"filter": {"field": field, "valid": True}}]
    layers: list[Spec] = [
        {"transform": known, "mark": shape, "encoding": {"x": _step(), "y": here}},
        {
            "transform": known,
            "mark": {"type": "point", "filled": True, "size": 9, "opacity": 1, "color": line.color, "clip": True},
            "encoding": {"x": _step(), "y": here},
        },
    ]
    if line.band:
        low, high = (f"{line.column}\\.{end}" for end in ("low", "high"))
        area: Spec = {
            "transform": [{"filter": {"and": [{"field": low, "valid": True}, {"field": high, "valid": True}]}}],
            "mark": {"type": "area", "color": line.color, "opacity": 0.13, "clip": True},
            "encoding": {"x": _step(), "y": {**here, "field": low}, "y2": {"field": high}},
        }
        layers.insert(0, area)
    return layers


def _marks(verdict: Verdict) -> list[Spec]:
    """The turning point and the checkpoint to keep."""
    layers = []
    point, keep = verdict.turning_point, verdict.keep
    if point is not None:
        layers.append(_rule(point.step, "var(--turn)", [5, 3]))
    layers += [_rule(step, "var(--quiet)", [1, 3]) for step in others(verdict)]
    if keep is not None:
        layers.append(_rule(keep.step, "var(--keep)", [1, 0]))
    return layers


def _rule(step: float, color: str, dash: list[int]) -> Spec:
    return {
        "data": {"values": [{"step": step}]},
        "mark": {"type": "rule", "color": color, "strokeWidth": 1.5, "strokeDash": dash, "clip": True},
        "encoding": {"x": _step()},
    }


def cursor(name: str, color: str | Spec, width: float = 1, opacity: float = 1, x: Spec | None = None) -> Spec:
    """Where the person or the pointer is: a line whose place is a signal."""
    x = x or _step()
    place = x["field"]
    return {
        "data": {"values": [{}]},
        "transform": [{"calculate": name, "as": place}, {"filter": f"datum.{place} >= low && datum.{place} <= high"}],
        "mark": {"type": "rule", "color": color, "strokeWidth": width, "opacity": opacity, "clip": True},
        "encoding": {"x": x},
    }


def _valleys() -> tuple[Spec, ...]:
    here = {"x": _step(), "y": {"field": "cs_fluctuation", "type": "quantitative"}}
    valley = [{"filter": {"field": "valley", "valid": True}}]
    shape: Spec = {"type": "point", "shape": "triangle-down", "size": 55, "filled": True, "color": "var(--turn)"}
    return (
        {"transform": valley, "mark": {**shape, "clip": True}, "encoding": here},
        {
            "transform": [*valley, {"filter": "datum.valley <= 3"}],
            "mark": {"type": "text", "dy": 13, "color": "var(--quiet)", "fontSize": 10, "clip": True},
            "encoding": {**here, "text": {"field": "valley", "type": "quantitative"}},
        },
    )


def _chance(verdict: Verdict) -> tuple[Spec, ...]:
    """Where random walks, other modules and other windows turn."""
    layers: list[Spec] = []
    band, other, sweep = null_band(verdict), layer_interval(verdict), window_sweep(verdict)
    if band:
        layers.append(_stretch(band, {"type": "rect", "color": "var(--rule)", "opacity": 0.35}))
    if other:
        layers.append(_stretch(other, {"type": "rule", "color": "var(--second)", "strokeWidth": 4, "y": 4}))
    if sweep:
        layers.append(
            {
                "data": {"values": [{"step": step} for step in sweep]},
                "mark": {"type": "tick", "orient": "vertical", "color": "var(--ink)", "y": 12, "size": 9, "clip": True},
                "encoding": {"x": _step()},
            }
        )
    return tuple(layers)


def _stretch(span: tuple[float, float], mark: Spec) -> Spec:
    return {
        "data": {"values": [{"from": span[0], "to": span[1]}]},
        "mark": {**mark, "clip": True},
        "encoding": {"x": _step("from"), "x2": {"field": "to"}},
    }


def _told(line: Line, table: Lines, verdict: Verdict) -> str:
    pairs = [(s, v) for s, v in zip(table["step"], table[line.middle], strict=True) if v is not None]
    (first, start), (last, end) = pairs[0], pairs[-1]
    low, high = (choose(pairs, key=lambda pair: pair[1]) for choose in (min, max))
    unit = verdict.step_unit
    return (
        f"{line.label}{', median' if line.band else ''}: {number(start, 3)} at {unit} {first}, "
        f"{number(end, 3)} at {last}; "
        f"lowest {number(low[1], 3)} at {low[0]}, highest {number(high[1], 3)} at {high[0]}"
    )
