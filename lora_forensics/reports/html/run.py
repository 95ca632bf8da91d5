"""The page of one run: the answer on the first screen, then the evidence, then everything else."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from lora_forensics.records import Verdict
from lora_forensics.reports import text
from lora_forensics.reports.html import charts, data
from lora_forensics.reports.html.answer import answer, inside
from lora_forensics.reports.html.page import data_block, document, esc
from lora_forensics.reports.html.parts import THEME, Markup, skipped, table, tools
from lora_forensics.reports.html.samples import sample_columns
from lora_forensics.reports.html.tables import RunTables

_MODULES = 1200
"""Modules in the table; beyond, those that changed most."""
_SHOWN = (
    ("checkpoint", "file"),
    ("epoch", "epoch"),
    ("learning_rate", "rate"),
    ("probe_score", "probe score"),
    ("held_out_loss", "held-out loss"),
    ("train_loss", "training loss"),
    ("cosine", "CS"),
    ("cs_fluctuation", "CS-Fluctuation"),
    ("relative_norm.mid", "change / weight"),
    ("step_size.mid", "movement"),
    ("effective_rank.mid", "effective rank"),
    ("spectral_norm.mid", "largest sigma"),
)
"""Numbers of the picked checkpoint."""


def run_page(verdict: Verdict, tables: RunTables, versions: dict[str, str]) -> str:
    """The document."""
    lines = data.lines(tables, verdict)
    drawn = [chart for chart in charts.charts(verdict) if chart.known(lines)]
    cells, cloud = data.cells(tables), data.cloud(tables, verdict)
    name = verdict.run or "."
    first = _decisive(verdict, drawn)
    body = f"""<a class="skip" href="#main">Skip to the answer</a>
<header><h1>{esc(name)}</h1><p>{esc(text.facts(verdict))}</p>{THEME}</header>
<main id="main" class="wrap">
{answer(verdict)}
{_stepper(lines, verdict) if lines["step"] else ""}
{_charts("".join(_figure(chart, lines, verdict) for chart in first) + _cloud(cloud), verdict)}
{_candidates(verdict, lines)}
{_samples(verdict, lines)}
{_column(cells, verdict)}
{_modules(tables, verdict)}
{_checkpoints(lines, verdict)}
<section><h2>Skipped</h2>{skipped(inside(verdict))}</section>
{_method(verdict, versions, tables)}
</main>
<footer>Made by lora-forensics from verdict.json and the Parquet files beside this page.
It opens without a network and asks nothing of one.</footer>"""
    if not lines["step"]:
        return document(f"{text.plain(name)}: which checkpoint to keep", body)
    columns = list(cells["maps"])
    page: dict[str, Any] = {
        "table": lines,
        "unit": text.plain(verdict.step_unit),
        "start": verdict.keep.step if verdict.keep else None,
        "charts": [
            {"name": c.name, "spec": c.spec(lines, verdict), "columns": [(x.middle, x.label) for x in c.known(lines)]}
            for c in first
        ],
        "cells": {**cells, "rows": [[text.plain(label), text.plain(what), n] for label, what, n in cells["rows"]]},
        "cloud": {**cloud, "modules": [text.plain(module) for module in cloud["modules"]]},
        "meanings": {column: text.plain(tables.meaning(column)) for column in columns},
        "specs": {
            "column": charts.column_chart(),
            "map": charts.map_chart(max(1, len(cells["rows"]))),
            "cloud": charts.cloud_chart(),
        },
    }
    if "checkpoint" in lines:
        page["table"] = {**lines, "checkpoint": [text.plain(file) for file in lines["checkpoint"]]}
    block = data_block("data", page)
    return document(f"{text.plain(name)}: which checkpoint to keep", body, charts=True, data=block)


def _decisive(verdict: Verdict, drawn: list[charts.Chart]) -> list[charts.Chart]:
    """The charts, with the one first that the answer rests on."""
    held = verdict.keep is not None and verdict.keep.rests_on in ("held_out_loss", "probe")
    order = ("probe", "loss", "fluctuation", "cs") if held else ("fluctuation", "cs", "loss", "probe")
    ranks = {name: place for place, name in enumerate(order)}
    return sorted(drawn, key=lambda chart: ranks.get(chart.name, len(ranks)))


def _charts(figures: str, verdict: Verdict) -> str:
    if not figures:
        return ""
    return f"""<section aria-label="Charts"><h2 class="vh">Charts</h2>{_legend(verdict)}
<div class="charts">{figures}</div></section>"""


def _legend(verdict: Verdict) -> str:
    keep, point, unit = verdict.keep, verdict.turning_point, esc(verdict.step_unit)
    items = [f'<li><i class="k"></i>kept: {unit} {keep.step}</li>'] if keep else []
    items += [f'<li><i class="t"></i>turning point: {unit} {point.step}</li>'] if point else []
    items += ['<li><i class="c"></i>to compare</li>'] if charts.others(verdict) else []
    items += ['<li><i class="p"></i>picked</li>', '<li><i class="h"></i>pointer</li>']
    return (
        f'<ul class="legend">{"".join(items)}<li>Click or slide to pick, drag to zoom, double click for all</li></ul>'
    )


def _stepper(lines: data.Lines, verdict: Verdict) -> str:
    """The slider that picks a checkpoint in all charts, and that checkpoint's numbers."""
    jumps = [("kept", verdict.keep.step)] if verdict.keep else []
    jumps += [("turning point", verdict.turning_point.step)] if verdict.turning_point else []
    jumps += [("last", lines["step"][-1])]
    buttons = "".join(f'<button type="button" data-step="{step}">{label}</button>' for label, step in jumps)
    numbers = "".join(
        f'<div{" class=name" if column == "checkpoint" else ""}><dt>{label}</dt><dd data-column="{column}"></dd></div>'
        for column, label in _SHOWN
        if column in lines
    )
    return f"""<section aria-label="Picked checkpoint"><h2 class="vh">Picked checkpoint</h2><div class="bar">
<label for="step">Checkpoint</label><input type="range" id="step" min="0" max="{len(lines["step"]) - 1}" value="0">
<output id="step-label" for="step"></output>{buttons}
<button type="button" id="zoom">Zoom in</button><button type="button" id="unzoom" disabled>Show all</button>
<dl class="numbers">{numbers}</dl></div>
<noscript><p>The charts need JavaScript; the tables below do not.</p></noscript></section>"""


def _figure(chart: charts.Chart, lines: data.Lines, verdict: Verdict) -> str:
    title, said = esc(chart.title), esc(chart.described(lines, verdict))
    return (
        f'<figure><h3>{title}</h3><div class="chart" id="chart-{chart.name}" role="img" aria-label="{title}. {said}">'
        f'</div><figcaption class="note">{esc(chart.caption(lines))}</figcaption></figure>'
    )


def _cloud(cloud: dict[str, Any]) -> str:
    if not cloud["points"]:
        return ""
    said = f"{len(cloud['modules'])} modules at {len(cloud['steps'])} checkpoints"
    return (
        '<figure><h3>Magnitude against direction change</h3><div class="chart still" id="chart-cloud" role="img" '
        f'aria-label="Magnitude change against direction change of {said}."></div><figcaption class="note">A point for '
        'each module; strong: at <span id="cloud-step"></span>, faint: all others.</figcaption></figure>'
    )


def _column(cells: dict[str, Any], verdict: Verdict) -> str:
    """Any column of the table of modules, over the steps and as a heat map."""
    if not cells["maps"]:
        return ""
    start = "cosine_rowwise" if verdict.similarity == "rowwise" else "cosine"
    options = "".join(
        f'<option value="{esc(name)}"{" selected" if name == start else ""}>{esc(name.replace("_", " "))}</option>'
        for name in cells["maps"]
    )
    grouped = any(many > 1 for _, _, many in cells["rows"])
    many = f"{len(cells['rows'])} {'groups of modules (means by block and role)' if grouped else 'modules'}"
    sizes = f"{many} by {len(cells['steps'])} checkpoints"
    unit = esc(verdict.step_unit)
    return "".join(
        (
            f"<section><h2>Every module over the {unit}s</h2><p><label>Column ",
            f'<select id="column">{options}</select></label> <span class="quiet" id="column-meaning"></span></p>',
            '<figure><div class="chart" id="chart-column" role="img" aria-label="The chosen column over the ',
            f'{unit}s: median and tenths over modules. The table of modules has its numbers at one checkpoint."></div>',
            f'<div class="chart" id="chart-map" role="img" aria-label="Heat map of the chosen column: {sizes}."></div>',
            f'<figcaption class="note">{sizes}; the outermost 2 % share the last colour. Above: median over modules ',
            "in scope, band from the lowest to the highest tenth.</figcaption></figure></section>",
        )
    )


def _candidates(verdict: Verdict, lines: data.Lines) -> str:
    if not verdict.candidates:
        return ""
    columns = [(c, label) for c, label in _SHOWN[1:] if c in lines]
    kept = verdict.keep.step if verdict.keep else None
    at = {step: place for place, step in enumerate(lines["step"])}
    rows = [
        [
            entry.step,
            _kept(entry.checkpoint, kept == entry.step),
            entry.why,
            *(lines[column][at[entry.step]] if entry.step in at else None for column, _ in columns),
        ]
        for entry in verdict.candidates
    ]
    heads = [verdict.step_unit, "file", "what speaks for it", *(label for _, label in columns)]
    numeric = frozenset((0, *range(3, len(heads))))
    caption = "Checkpoints worth comparing; metrics are medians over modules."
    return f"<section><h2>Candidates</h2>{table('candidates', caption, heads, rows, numeric, kept)}</section>"


def _samples(verdict: Verdict, lines: data.Lines) -> str:
    """The images that the trainer saved, candidates side by side."""
    epochs = dict(zip(lines.get("epoch", ()), lines["step"], strict=False))
    epochs.pop(None, None)
    prompts, columns = sample_columns(verdict, epochs)
    if not columns:
        return ""
    unit = esc(verdict.step_unit)
    heads = "".join(f"<th scope=col>{unit} {c.step}<br><span class=quiet>{esc(c.why)}</span></th>" for c in columns)
    rows = "".join(
        f"<tr><th scope=row>{esc(_prompt(prompt))}</th>"
        + "".join(_image(c.images[place], c.step, _prompt(prompt), unit) for c in columns)
        + "</tr>"
        for place, prompt in enumerate(prompts)
    )
    return f"""<section><h2>Samples of the trainer</h2>
<div class="scroll samples" tabindex="0" role="region" aria-labelledby="samples-caption"><table>
<caption id="samples-caption">For each candidate the image that was saved nearest to it, made smaller.</caption>
<thead><tr><th scope="col">prompt</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div></section>"""


def _prompt(name: str) -> str:
    """A prompt's name; a bare number where the trainer writes no more of it into the names of files."""
    return f"prompt {int(name)}" if name.isdecimal() else name


def _image(image: tuple[int, str] | None, step: int, prompt: str, unit: str) -> str:
    if image is None:
        return "<td class=quiet>not readable</td>"
    away = f"<p class=note>saved at {unit} {image[0]}</p>" if image[0] != step else ""
    return f'<td><img src="{image[1]}" alt="Sample for {esc(prompt)} at {unit} {image[0]}">{away}</td>'


def _modules(tables: RunTables, verdict: Verdict) -> str:
    heads, rows, total, step = data.module_rows(tables, verdict, _MODULES)
    if not rows:
        return ""
    which = f"the {len(rows)} that changed most of {total}" if len(rows) < total else f"all {total}"
    caption = (
        f"Modules at {text.plain(verdict.step_unit)} {step}, {which}; path length and settling over the whole run."
    )
    choices = [
        (label, place, sorted({row[place] for row in rows if row[place]}))
        for label, place in (("Component", 0), ("Role", 2), ("Kind", 3))
    ]
    numeric = frozenset(range(4, len(heads)))
    titles = [tables.meaning(head) for head in heads]
    shown = [[_named(value, place) for place, value in enumerate(row)] for row in rows]
    names = [head.replace("_", " ") for head in heads]
    body = table("modules", caption, names, shown, numeric, titles=titles)
    return f"<section><h2>Modules</h2>{tools('modules', choices)}{body}</section>"


def _named(value: Any, place: int) -> Any:
    return Markup(f"<span class=file>{esc(value)}</span>") if place == 1 else value


def _checkpoints(lines: data.Lines, verdict: Verdict) -> str:
    """The numbers behind the charts."""
    columns = [(column, label) for column, label in _SHOWN if column in lines]
    if not columns:
        return ""
    kept = verdict.keep.step if verdict.keep else None
    rows = [
        [step, *(_cell(lines, column, place, kept) for column, _ in columns)]
        for place, step in enumerate(lines["step"])
    ]
    heads = [verdict.step_unit, *(label for _, label in columns)]
    numeric = frozenset(place for place, head in enumerate(heads) if head != "file")
    every = verdict.checkpoints
    few = f" {len(rows)} of {every} checkpoints; all stand in checkpoints.parquet." if len(rows) < every else ""
    caption = f"The numbers behind the charts; metrics are medians over modules.{few}"
    return f"<section><h2>Checkpoints</h2>{table('checkpoints', caption, heads, rows, numeric, kept)}</section>"


def _cell(lines: data.Lines, column: str, place: int, kept: int | None) -> Any:
    value = lines[column][place]
    return _kept(value, kept == lines["step"][place]) if column == "checkpoint" else value


def _kept(file: str, kept: bool) -> Markup:
    """A file's name, and that it is kept: not only by a colour."""
    return Markup(f"{esc(file)}{' <b>kept</b>' if kept else ''}")


def _method(verdict: Verdict, versions: dict[str, str], tables: RunTables) -> str:
    """How it was measured."""
    used = {**versions, **verdict.versions}
    said: Iterable[tuple[str, str]] = (
        ("run", f"<code>{esc(verdict.path)}</code>" if verdict.path else ""),
        ("base model", f"<code>{esc(verdict.base_model.path)}</code>" if verdict.base_model.path else "none"),
        ("similarity", f"{esc(verdict.similarity)}, over {esc(', '.join(verdict.components) or 'no component')}"),
        ("detector", esc(verdict.detector)),
        ("window", esc(text.window(verdict).removeprefix("window "))),
        ("other signs", esc(text.agreement(verdict))),
        ("course", esc(text.analyses(verdict))),
        ("alignment", esc(verdict.evidence.get("alignment", ""))),
        ("versions", ", ".join(f"{esc(name)} {esc(version)}" for name, version in used.items())),
        (
            "noise",
            esc(json.dumps(data.rounded(verdict.evidence.get("noise"), 3))) if verdict.evidence.get("noise") else "",
        ),
    )
    items = "".join(f"<dt>{label}</dt><dd>{value}</dd>" for label, value in said if value)
    return f"""<section><h2>How it was measured</h2><dl>{items}</dl>
{_formulas(tables)}
<p class="note">CS-Fluctuation: the variance over a window of the smoothed slope of CS, divided by the learning rate
(Luo et al., Early-stopping Low-Rank Adaptation of Foundation Models, Eq. 1-4). Saved weights alone do not show which
checkpoint is best: compare the candidates on samples that were not trained on.</p></section>"""


def _formulas(tables: RunTables) -> str:
    """What each column means, as the Parquet file itself says it."""
    told = [tables.columns.get(name) for name in tables.metrics()]
    rows = [
        [entry.get("name"), entry.get("meaning"), entry.get("formula"), entry.get("unit"), entry.get("source")]
        for entry in told
        if isinstance(entry, dict)
    ]
    if not rows:
        return ""
    heads = ["column", "meaning", "formula", "unit", "source"]
    caption = "Columns of layers.parquet that hold a number in this run."
    return f"<details><summary>Formulas</summary>{table('formulas', caption, heads, rows, frozenset())}</details>"
