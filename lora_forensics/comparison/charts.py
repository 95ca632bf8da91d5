"""The chart of one measure as a Vega-Lite specification: a line a run, whatever lies along the axis.

`lit`, `picked`, `hover`, `low` and `high` are set by compare.js in all charts at once, and so are the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_forensics.comparison.values import Compared, values_of
from lora_forensics.plots.scales import log_floor
from lora_forensics.reports.html.charts import Spec, chart, cursor

DASHES = ((1, 0), (6, 3), (2, 2), (8, 2, 2, 2), (12, 4))
LOOKS = tuple((f"var(--c{color})", dash) for dash in DASHES for color in range(6))
"""Colour and dashes of each run: 30 before a look comes again."""
_LETTERED = 12
"""Runs whose lines end in their letters unless they are lit."""
_LIT = "indexof(lit, datum.run) >= 0"


def course_chart(measure: str, runs: Sequence[Compared]) -> Spec:
    """Lines that fade while others are lit, with the checkpoints to keep and the turning points on them."""
    values = values_of(measure, runs)
    largest = max(map(abs, values))
    y: Spec = {
        "field": "y",
        "type": "quantitative",
        "title": None,
        "scale": {"zero": False, "nice": False, "padding": 8},
    }
    y["axis"] = {"format": ".2~e" if 0 < largest < 1e-3 else ".3~g"}
    floor = log_floor(values)
    if floor is not None:
        end = {"domainMin": floor, "clamp": True} if floor > min(values) else {}
        scale = {"type": "log", "nice": False, "padding": 8, **end}
        y |= {"scale": scale, "axis": {"format": "~e", "tickCount": 4}}
    here: Spec = {"x": _along(), "y": y}
    shapes = list(range(len(DASHES)))
    look: Spec = {
        "color": {"field": "color", "type": "nominal", "scale": None},
        "strokeDash": {
            "field": "dash",
            "type": "nominal",
            "scale": {"domain": shapes, "range": [list(dash) for dash in DASHES]},
            "legend": None,
        },
        "detail": {"field": "run", "type": "nominal"},
    }
    faded = {"opacity": {"condition": {"test": f"length(lit) === 0 || {_LIT}", "value": 0.9}, "value": 0.16}}
    lit = [{"filter": _LIT}]
    fill: Spec = {"fill": {"field": "color", "type": "nominal", "scale": None}}
    named = "datum.name" if len(runs) <= _LETTERED else f"datum.name && {_LIT}"
    layers: list[Spec] = [
        cursor("picked", "var(--ink)", 7, 0.16, _along()),
        {"mark": {"type": "line", "strokeWidth": 1.4, "clip": True}, "encoding": {**here, **look, **faded}},
        {
            "transform": lit,
            "mark": {"type": "line", "strokeWidth": 3, "clip": True},
            "encoding": {**here, **look},
        },
        {
            "transform": [{"filter": f"datum.alone || {_LIT}"}],
            "mark": {"type": "point", "filled": True, "size": 14, "opacity": 1, "clip": True},
            "encoding": {**here, **fill},
        },
        *(_mark(name, shape, {**here, **fill, **faded}) for name, shape in _MARKS.items()),
        {
            "transform": [{"filter": named}],
            "mark": {"type": "text", "align": "left", "dx": 4, "fontSize": 11, "fontWeight": "bold", "clip": True},
            "encoding": {**here, **fill, **faded, "text": {"field": "name", "type": "nominal"}},
        },
        cursor("hover", "var(--quiet)", x=_along()),
    ]
    spec = chart(layers, 210)
    spec["params"].append({"name": "lit", "value": []})
    return spec


_MARKS = {"turning": "triangle-down", "kept": "diamond"}


def _mark(name: str, shape: str, encoding: Spec) -> Spec:
    """Where a verdict stands on its run's line."""
    look: Spec = {"type": "point", "shape": shape, "size": 80, "stroke": "var(--ground)", "strokeWidth": 1}
    return {
        "transform": [{"filter": f"datum.mark === '{name}'"}],
        "mark": {**look, "opacity": 1, "clip": True},
        "encoding": encoding,
    }


def _along() -> Spec:
    ends = {"domainMin": {"expr": "low"}, "domainMax": {"expr": "high"}, "zero": False, "nice": False}
    axis = {"tickCount": 6, "grid": False, "format": ".6~g"}
    return {"field": "x", "type": "quantitative", "title": None, "axis": axis, "scale": ends}
