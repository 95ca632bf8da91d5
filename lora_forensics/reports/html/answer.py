"""The first screen of a run's page: which file, why, on what evidence, and what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from lora_forensics.plots.page import layer_interval, null_band, window_sweep
from lora_forensics.records import Finding, Skipped, Verdict
from lora_forensics.reports import text
from lora_forensics.reports.html.data import better
from lora_forensics.reports.html.page import esc
from lora_forensics.reports.html.parts import findings

_MEASURED, _WEAK = '<b class="measured">Measured</b>', '<b class="weak">Weak</b>'
_COMPARE = "Judge by samples that were not trained on."
_STRENGTH = {
    "held_out_loss": f"{_MEASURED}: the trainer's own loss on data that was not trained on. It overrules the weights.",
    "weights": f"{_WEAK}: saved weights alone; in tests not shown to beat the middle checkpoint. {_COMPARE}",
    "turning_point": f"{_WEAK}: saved weights alone; in tests not better than the middle checkpoint. {_COMPARE}",
}
"""What each kind of evidence is worth (docs/validity.md), as markup; a probe says its own."""
_NOTHING = {
    "unhealthy": "No checkpoint is fit to keep.",
    "no_base_model": "Without the base model there are no cosines, and without these no rule names a checkpoint.",
    "too_few_checkpoints": "Too few checkpoints for any rule on saved weights.",
    "no_second_valley": "CS-Fluctuation has no second valley, and there is no other evidence.",
}
"""Why there is no answer, in words of our own."""


def answer(verdict: Verdict) -> str:
    """The two columns of the first screen."""
    keep = verdict.keep
    told = "".join(f"<dt>{label}</dt><dd>{value}</dd>" for label, value in _rows(verdict) if value)
    file = f'<p class="file">{esc(keep.checkpoint)}</p>' if keep else '<p class="none">None can be named yet</p>'
    worse = [finding for finding in verdict.findings if finding.severity != "info"]
    fine = "" if worse else "<p>No error and no warning.</p>"
    wrong = findings([_near(finding, verdict) for finding in verdict.findings])
    return f"""<div class="answer">
<section class="keep{"" if keep else " nothing"}"><h2>Which checkpoint to keep</h2>{file}
<dl>{told}</dl></section>
<section><h2>What is wrong with this run</h2>{fine}{wrong}</section></div>"""


def inside(verdict: Verdict) -> list[Skipped]:
    """What was skipped, with its place in the run's folder."""
    return [
        replace(entry, path=entry.path.relative_to(verdict.path))
        if verdict.path and entry.path.is_relative_to(verdict.path)
        else entry
        for entry in verdict.skipped
    ]


def _near(finding: Finding, verdict: Verdict) -> Finding:
    """Without the run's own folder before the files in it, which pushes their names off the screen."""
    folder = f"{verdict.path}/" if verdict.path and len(verdict.path) > 1 else "\0"
    return replace(finding, message=finding.message.replace(folder, ""), hint=finding.hint.replace(folder, ""))


def _rows(verdict: Verdict) -> Iterator[tuple[str, str]]:
    """Labels, and their markup."""
    keep, unit = verdict.keep, esc(verdict.step_unit)
    yield "why", f'<span class="why">{_why(verdict)}</span>'
    if keep is not None:
        yield "evidence", _probe(verdict) if keep.rests_on == "probe" else _STRENGTH.get(keep.rests_on, "")
    others = [entry for entry in verdict.candidates if keep is None or entry.checkpoint != keep.checkpoint]
    if keep is None:
        files = "".join(f"<li><span class=file>{esc(c.checkpoint)}</span> ({esc(c.why)})</li>" for c in others)
        yield "worth a look", files and f"<ul>{files}</ul>"
    else:
        yield "compare with", ", ".join(f"{unit} {entry.step} ({esc(entry.why)})" for entry in others)
    scores = esc(text.probe(verdict))
    yield "scores", scores and f"{scores} ({better(verdict)} is better)"
    yield "turning point", _turning(verdict)
    if all(finding.rule != "last-is-past" for finding in verdict.findings):
        yield "last checkpoint", esc(text.last(verdict))
    base = verdict.base_model
    if base.total:
        where = f", <code>{esc(_beside(base.path, verdict.path))}</code>" if base.path else ""
        found = esc(f"{base.matched} of {text.count(base.total, 'module')} have a base weight")
        yield "base model", f"{found}{where}"


def _beside(path: str, run: str | None) -> str:
    """A path from the run's folder where that is short; the whole one stands under how it was measured."""
    place, home = PurePath(path), PurePath(run or "")
    for up, folder in enumerate(list(home.parents)[:2] if home.is_absolute() else (), start=1):
        if place.is_relative_to(folder) and len(folder.parts) > 1:
            return PurePath(*[".."] * up, place.relative_to(folder)).as_posix()
    return path


def _why(verdict: Verdict) -> str:
    keep = verdict.keep
    if keep is None:
        said = text.headline(verdict)
        known = any(finding.message and said.startswith(text.plain(finding.message)) for finding in verdict.findings)
        short = _NOTHING.get(verdict.status, "")
        return short if short and known else esc(said)
    if keep.rests_on == "weights":  # its worth has a row of its own
        return esc(_sentence(f"{text.RESTS_ON['weights']} is covered at {text.place(verdict, keep.step, keep.epoch)}"))
    return esc(_sentence(text.why(verdict)))


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."


def _probe(verdict: Verdict) -> str:
    """How many checkpoints were scored, on how much, and which the samples cannot tell apart."""
    found = verdict.evidence.get("probe")
    known: dict[str, Any] = found if isinstance(found, dict) else {}
    scored, flat = (_steps(known.get(name)) for name in ("evaluations", "flat"))
    many = f" on {text.count(known['samples'], 'sample')}" if isinstance(known.get("samples"), int) else ""
    keep = verdict.keep
    others = [step for step in flat if keep is None or step != keep.step]
    same = f" These cannot tell it from {esc(verdict.step_unit)} {', '.join(map(str, others))}." if others else ""
    return f"{_MEASURED}: a probe of {text.count(len(scored), 'checkpoint')}{many}. It overrules the weights.{same}"


def _steps(entries: object) -> list[int]:
    listed = entries if isinstance(entries, list) else []
    return [entry["step"] for entry in listed if isinstance(entry, dict) and isinstance(entry.get("step"), int)]


def _turning(verdict: Verdict) -> str:
    """Where the paper's turning point is, and whether chance would put it there, too."""
    point, unit = verdict.turning_point, esc(verdict.step_unit)
    if point is None:
        return esc(verdict.message) if verdict.keep is not None else ""
    place = esc(text.place(verdict, point.step, point.epoch))
    rests_on = _range((point.step, point.support_end_step))
    said = f"{place}: second valley of CS-Fluctuation, computed from {unit}s {rests_on}."
    band, other, sweep = null_band(verdict), layer_interval(verdict), window_sweep(verdict)
    if band and verdict.evidence.get("inside_null_band"):
        said += f" This is no evidence: random walks turn at {unit}s {_range(band)}, too."
    elif band:
        said += f" Random walks turn elsewhere, at {unit}s {_range(band)}."
    spread = [f"other windows it is at {_range((min(sweep), max(sweep)))}"] if sweep else []
    spread += [f"other modules at {_range(other)}"] if other else []
    return f"{said} With {' and '.join(spread)}." if spread else said


def _range(span: tuple[float, float]) -> str:
    return "-".join(dict.fromkeys(text.number(end) for end in span))
