"""A comparison as one HTML page: what differs and what each run's answer is, then the courses over each other."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import polars as pl

from lora_forensics import __version__
from lora_forensics.comparison.charts import DASHES, LOOKS, course_chart
from lora_forensics.comparison.comparable import alike
from lora_forensics.comparison.text import letters
from lora_forensics.comparison.values import ALIGN, MEASURES, Compared, Comparison, values_of
from lora_forensics.errors import UsageError
from lora_forensics.plots.scales import below
from lora_forensics.reports.html import HtmlReport
from lora_forensics.reports.html.data import rounded
from lora_forensics.reports.html.page import data_block, document, esc
from lora_forensics.reports.html.parts import THEME, Markup, findings, skipped, table
from lora_forensics.reports.text import RESTS_ON, STATUS, count, number, plain
from lora_forensics.series import write_text

AXES = {"step": "step", "epoch": "epoch", "dose": "dose (sum of the learning rates)"}
"""What lies along the axis, in words."""
_POINTS = 16000
"""Checkpoints in the page; beyond, every n-th of each run and those that its verdict names."""
_TOGETHER = 2
"""Settings that stand in one line where they divide the runs alike."""
_FILE = 44
"""Signs of a file's name that stand in one line."""
_VALUES = 6
"""Values of a setting that are named on the first screen."""


def comparison_page(found: Comparison, beside: Path) -> str:
    """The document; links are relative to the folder `beside`, in which it will lie."""
    names = letters(len(found.runs))
    aligns = [a for a in ALIGN if any(run.course[a].is_not_null().any() for run in found.runs)]
    measures = [m for m in MEASURES if aligns and any(run.course[m].is_finite().any() for run in found.runs)]
    align = found.align if found.align in aligns else next(iter(aligns), found.align)
    about = f"{count(len(found.runs), 'run')}, {_keeping(found.runs)}"
    body = f"""<a class="skip" href="#main">Skip to the runs</a>
<header><h1>Runs side by side</h1><p>{esc(about)}</p>{THEME}</header>
<main id="main" class="wrap">
<div class="answer"><section><h2>What differs</h2>{_differences(found, names)}</section>
<section><h2>What can be compared</h2>{_comparable(found, names)}</section></div>
<section class="first"><h2>Which checkpoint to keep</h2>{_answers(found, names, beside)}
<p class="note">Evidence: strong is measured on held-out data or scored by a probe; weak is told from weights alone,
which was not shown to beat the middle checkpoint. Runs stand as they were named; no order is meant.</p></section>
{_courses(found, names, aligns, align, measures) if measures else "<p>No course is known.</p>"}
{_settings(found, names)}
{_findings(found, names)}
<section><h2>Not compared</h2>{skipped(found.left_out) if found.left_out else "<p>Nothing was left out.</p>"}</section>
</main>
<footer>Made by lora-forensics {__version__} from the tables of scans.
It opens without a network and asks nothing of one.</footer>"""
    if not measures:
        return document("Runs side by side", body)
    page = {
        "align": align,
        "axes": AXES,
        "ends": {name: _ends(found.runs, name) for name in aligns},
        "runs": list(_data(found.runs, names, aligns, measures)),
        "charts": [{"name": m, "title": MEASURES[m], "spec": course_chart(m, found.runs)} for m in measures],
    }
    return document("Runs side by side", body, charts=True, data=data_block("data", page), own="compare")


def write_page(found: Comparison, path: Path) -> None:
    """Write the page; its folder is made.

    Raises:
        UsageError: the extra is missing, or the path is a folder.
        SeriesError: it cannot be written.
    """
    HtmlReport().check()
    if path.is_dir():
        raise UsageError(f"{path} is a folder, not a file", f"name a file: --html {path / 'comparison.html'}")
    write_text(path, comparison_page(found, path.parent))


def _keeping(runs: Sequence[Compared]) -> str:
    kept = sum(run.verdict.keep is not None for run in runs)
    return f"{kept} with a checkpoint to keep, {len(runs) - kept} without"


def _ends(runs: Sequence[Compared], align: str) -> list[float]:
    axes = [run.course[align].drop_nulls() for run in runs]
    known = [value for axis in axes for value in axis]
    low, high = min(known), max(known)
    return [int(low), int(high)] if align == "step" else [low, high]


def _data(
    runs: Sequence[Compared], names: Sequence[str], aligns: Sequence[str], measures: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """What the script draws of each run."""
    every = -(-sum(len(run.course) for run in runs) // _POINTS)
    for place, (run, letter) in enumerate(zip(runs, names, strict=True)):
        named = {point.step for point in run.verdict.points()}
        course = run.course.with_row_index("at")
        course = course.filter((pl.col("at") % every == 0) | pl.col("place").is_in(named))
        columns = {name: [rounded(value, 7) for value in course[name]] for name in aligns}
        if "step" in columns:
            columns["step"] = course["step"].cast(pl.Int64).to_list()
        known = {name: [rounded(value) for value in course[name]] for name in measures}
        apart = {name: course[name].drop_nulls().sort().diff().median() or 0.0 for name in aligns}
        color, dash = LOOKS[place % len(LOOKS)]
        keep, turn = run.verdict.keep, run.verdict.turning_point
        yield {
            "name": plain(run.name) or ".",
            "letter": letter,
            "color": color,
            "dash": DASHES.index(dash),
            "keep": keep.step if keep else None,
            "turn": turn.step if turn else None,
            "apart": apart,
            "course": {"place": course["place"].to_list(), **columns, **known},
        }


def _look(place: int) -> str:
    """How a run's line looks."""
    color, dash = LOOKS[place % len(LOOKS)]
    dashes = f' stroke-dasharray="{" ".join(map(str, dash))}"' if dash[1] else ""
    return (
        '<svg class="look" width="30" height="8" aria-hidden="true" focusable="false">'
        f'<line x1="0" y1="4" x2="30" y2="4" stroke="{color}"{dashes}></line></svg>'
    )


def _listed(places: Iterable[int], names: Sequence[str]) -> str:
    """'A-C, F'."""
    spans: list[list[int]] = []
    for place in places:
        if spans and spans[-1][1] == place - 1:
            spans[-1][1] = place
        else:
            spans.append([place, place])
    return ", ".join(names[a] if a == b else f"{names[a]}{', ' if b == a + 1 else '-'}{names[b]}" for a, b in spans)


def _differences(found: Comparison, names: Sequence[str]) -> str:
    """Settings that are known to differ, those together that divide the runs alike: values, and the runs with them."""
    together: dict[tuple[int, ...], dict[str, list[str]]] = {}
    for label, values in found.differing().items():
        first = {value: place for place, value in reversed([*enumerate(values)])}
        together.setdefault(tuple(first[value] for value in values), {})[label] = values
    items = [
        f"<dt>{esc(', '.join(settings))}</dt><dd>{_shared([*zip(*settings.values(), strict=True)], names)}</dd>"
        for group in together.values()
        for settings in ([group] if len(group) <= _TOGETHER else [{label: group[label]} for label in group])
    ]
    partly = found.partly()
    if partly:
        items.append(f"<dt>told by some only</dt><dd>{esc(', '.join(partly))}: may differ</dd>")
    if not items:
        return "<p>No setting is known to differ.</p>"
    rest = f"<details><summary>{len(items) - 7} more</summary><dl>{''.join(items[7:])}</dl></details>"
    return f"<dl>{''.join(items[:7])}</dl>{rest if len(items) > 7 else ''}"


def _shared(values: Sequence[tuple[str, ...]], names: Sequence[str]) -> str:
    groups: dict[tuple[str, ...], list[int]] = {}
    for place, value in enumerate(values):
        groups.setdefault(value, []).append(place)
    untold = [at for value, at in groups.items() if set(value) == {"?"}]
    shown = [f"<b>{esc(', '.join(v))}</b> ({_listed(at, names)})" for v, at in groups.items() if set(v) != {"?"}]
    more = f"; and {len(shown) - _VALUES} other values" if len(shown) > _VALUES else ""
    return "; ".join(shown[:_VALUES]) + more + "".join(f"; not told ({_listed(at, names)})" for at in untold)


def _comparable(found: Comparison, names: Sequence[str]) -> str:
    """What the numbers of different runs allow to say, and what not."""
    said = []
    for group in sorted(alike(found.runs), key=len, reverse=True)[:3]:
        lowest = min(group, key=lambda place: _lowest(found.runs[place])[0])
        loss, step = _lowest(found.runs[lowest])
        if len(group) > 1:
            run = found.runs[lowest]
            same = "of one trainer, base and amount of data as far as files say, held-out loss (if of the same data)"
            said.append(
                f"<li>Among {_listed(group, names)}, {same} is lowest in <b>{names[lowest]}</b> "
                f"({esc(run.name)}): {number(loss)} at {esc(run.verdict.step_unit)} {step}.</li>"
            )
    for measure, note in sorted(found.notes.items(), key=lambda pair: not pair[0].endswith("loss")):
        kind = " class=not" if note.startswith("not ") else ""
        said.append(f"<li><b>{esc(MEASURES[measure])}</b>: <span{kind}>{esc(note)}</span></li>")
    if found.left_out:
        said.append(f'<li><span class="not">Left out, see below: {len(found.left_out)}.</span></li>')
    return f'<ul class="findings">{"".join(said)}</ul>' if said else "<p>Nothing is known against it.</p>"


def _lowest(run: Compared) -> tuple[float, int]:
    known = run.course.filter(pl.col("held_out_loss").is_finite()).sort("held_out_loss")
    row = known.row(0, named=True)
    return row["held_out_loss"], row["place"]


def _named(run: Compared, place: int, letter: str, address: str = "") -> Markup:
    name = esc(run.name or ".")
    linked = f'<a href="{address}">{name}</a>' if address else name
    return Markup(f"<span data-of={place}>{_look(place)}<b>{letter}</b> {linked}</span>")


def _answers(found: Comparison, names: Sequence[str], beside: Path) -> str:
    scored = any(run.results.get("probe", "-") != "-" for run in found.runs)
    heads = ["run", "keep", "at", "rests on", "evidence", "held-out loss", "turning point"]
    heads += ["probe"] if scored else []
    rows = []
    for place, (run, letter) in enumerate(zip(found.runs, names, strict=True)):
        keep, point, unit = run.verdict.keep, run.verdict.turning_point, run.verdict.step_unit
        short = keep is not None and len(keep.checkpoint) <= _FILE
        file = f"<span{' class=short' if short else ''}>{esc(keep.checkpoint)}</span>" if keep else _none(run)
        rows.append(
            [
                _named(run, place, letter, _link(run.report, beside)),
                Markup(file),
                f"{unit} {keep.step}" if keep else "",
                RESTS_ON.get(keep.rests_on, keep.rests_on) if keep else "",
                run.results["evidence"].partition(":")[0],
                _loss(run),
                f"{unit} {point.step}" if point else "",
                *([run.results["probe"]] if scored else []),
                _severities(run),
            ]
        )
    return table(
        "runs",
        "One row a run; the name opens its own report where that lies beside this page.",
        [*heads, "findings"],
        rows,
        frozenset(),
    )


def _none(run: Compared) -> str:
    return f"no answer: {esc(STATUS.get(run.verdict.status, run.verdict.status))}"


def _loss(run: Compared) -> str:
    """At the checkpoint to keep, and the lowest where that is another."""
    there, best = run.kept().get("held_out_loss"), run.results["best held-out"]
    said = [] if there is None else [number(there)]
    if best != "-" and (there is None or there > _lowest(run)[0]):
        said.append(f"lowest {best}")
    return ", ".join(said)


def _severities(run: Compared) -> str:
    many = Counter(finding.severity for finding in run.verdict.findings)
    said = ((many["error"], "error"), (many["warning"], "warning"))
    return ", ".join(count(times, word) for times, word in said if times) or "none"


def _link(report: Path | None, beside: Path) -> str:
    """A relative address in which nothing of a name has a meaning; '' where there is nothing to open."""
    try:
        way = os.path.relpath(report, beside) if report else ""
    except ValueError:  # another drive
        return ""
    return quote(os.path.join(".", way).replace(os.sep, "/"), errors="surrogateescape") if way else ""


def _courses(found: Comparison, names: Sequence[str], aligns: Sequence[str], align: str, measures: list[str]) -> str:
    radios = "".join(
        f'<label><input type="radio" name="align" value="{name}"{" checked" if name == align else ""}>{name}</label>'
        for name in aligns
    )
    buttons = "".join(
        f'<li><button type="button" data-run="{place}" aria-pressed="false" title="{esc(run.name)}">{_look(place)}'
        f"<b>{letter}</b> <span>{esc(run.name)}</span></button></li>"
        for place, (run, letter) in enumerate(zip(found.runs, names, strict=True))
    )
    figures = "".join(_figure(found, measure, align) for measure in measures)
    heads = ["run", *(MEASURES[measure] for measure in measures)]
    rows = [
        [
            _named(run, place, letter),
            *(Markup(f'<span data-run={place} data-measure="{measure}"></span>') for measure in measures),
        ]
        for place, (run, letter) in enumerate(zip(found.runs, names, strict=True))
    ]
    at = table(
        "values",
        "At the picked place: the nearest checkpoint of each run.",
        heads,
        rows,
        frozenset(range(1, len(heads))),
        titles=["", *(found.notes.get(measure, "") for measure in measures)],
    )
    return f"""<section aria-label="Courses"><h2>Courses</h2><div class="bar">
<fieldset><legend>Along</legend>{radios}</fieldset>
<label for="place">Place</label><input type="range" id="place" min="0" max="1000" value="500">
<output id="place-label" for="place"></output>
<button type="button" id="zoom">Zoom in</button><button type="button" id="unzoom" disabled>Show all</button>
<button type="button" id="only" aria-pressed="false" disabled>Only highlighted</button>
<button type="button" id="clear" disabled>No highlight</button>
<ul class="runs" aria-label="Runs to highlight" tabindex="0">{buttons}</ul></div>
<noscript><p>The charts need JavaScript; the tables do not.</p></noscript>
<p class="note">Diamond: the checkpoint to keep. Triangle: turning point. Hover over a line for its run; press a run to
highlight it; click to pick a place, drag to zoom. <span id="without" role="status"></span></p>
<div class="charts">{figures}</div></section>
<section><h2>At the picked place</h2>{at}</section>"""


def _figure(found: Comparison, measure: str, align: str) -> str:
    title, note = esc(MEASURES[measure]), esc(found.notes.get(measure, ""))
    note = f". {note[:1].upper()}{note[1:]}" if note else ""
    edge = below(values_of(measure, found.runs))
    note += f".{edge}" if edge else ""
    many = sum(bool(run.course[measure].is_finite().any()) for run in found.runs)
    said = f"{title} of {count(many, 'run')}, a line each. The table at the picked place has the numbers."
    return (
        f'<figure><h3>{title}</h3><div class="chart" id="chart-{measure}" role="img" aria-label="{said}"></div>'
        f'<figcaption class="note">Along <span data-axis>{esc(AXES[align])}</span>{note}'
        "</figcaption></figure>"
    )


def _settings(found: Comparison, names: Sequence[str]) -> str:
    """Settings that differ, one row a run; those that only some tell, and those that all share, folded."""
    differing, partly, same = found.differing(), found.partly(), found.same()
    told = {label: value for label, value in same.items() if value != "?"}
    parts = [_table_of("settings", "Settings that are known to differ.", differing, found, names)] if differing else []
    if partly:
        inside = _table_of("partly", "'?': not told.", partly, found, names)
        parts.append(f"<details><summary>{len(partly)} told by some runs only</summary>{inside}</details>")
    if told:
        items = "".join(f"<dt>{esc(label)}</dt><dd>{esc(value)}</dd>" for label, value in told.items())
        parts.append(f"<details><summary>{len(told)} the same in all runs</summary><dl>{items}</dl></details>")
    return f'<section class="settings"><h2>Settings</h2>{"".join(parts) or "<p>None is known.</p>"}</section>'


def _table_of(name: str, caption: str, settings: dict[str, list[str]], found: Comparison, names: Sequence[str]) -> str:
    rows = [
        [_named(run, place, names[place]), *(values[place] for values in settings.values())]
        for place, run in enumerate(found.runs)
    ]
    return table(name, caption, ["run", *settings], rows, frozenset())


def _findings(found: Comparison, names: Sequence[str]) -> str:
    """Errors and warnings with the runs that have them, then everything, run by run."""
    where: dict[tuple[str, str], list[int]] = {}
    for place, run in enumerate(found.runs):
        for severity, rule in dict.fromkeys((f.severity, f.rule) for f in run.verdict.findings):
            where.setdefault((severity, rule), []).append(place)
    worse = [(key, at) for severity in ("error", "warning") for key, at in where.items() if key[0] == severity]
    items = "".join(
        f'<li><span class="sev {severity}">{severity.capitalize()}</span> <code>{esc(rule)}</code>: '
        f"{_listed(at, names)}</li>"
        for (severity, rule), at in worse
    )
    each = "".join(
        f"<details><summary>{letter} {esc(run.name)}: {_severities(run)}</summary>"
        f"<p>{esc(run.verdict.message)}</p>{findings(run.verdict.findings)}</details>"
        for run, letter in zip(found.runs, names, strict=True)
    )
    shown = f'<ul class="findings">{items}</ul>' if items else "<p>No error and no warning.</p>"
    return f"<section><h2>Findings</h2>{shown}{each}</section>"
