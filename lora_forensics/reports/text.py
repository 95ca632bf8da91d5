"""Sentences that all reports share, and the one place where text from files is made harmless.

Everything returned here is plain: one line, printable, without terminal codes. Escaping for Markdown or HTML comes on
top and belongs to those reports.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from lora_forensics.records import Finding, Skipped, Summary, Verdict

RESTS_ON = {
    "held_out_loss": "lowest held-out loss",
    "probe": "best answer to the probe",
    "turning_point": "second valley of CS-Fluctuation",
    "weights": "half of the way that the weights moved",
}
"""What a checkpoint to keep rests on, in words."""

STATUS = {
    "unhealthy": "unhealthy",
    "no_base_model": "no base model",
    "too_few_checkpoints": "too few checkpoints",
    "no_second_valley": "no second valley",
    "turning_point": "turning point",
}
"""The verdict's status, in words."""

_TERMINAL_CODES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]?")


def plain(text: object) -> str:
    """Text from a file as one printable line: no terminal codes, control characters or direction marks."""
    bare = _TERMINAL_CODES.sub("", str(text))
    spaced = "".join(map(_printable, bare))
    return " ".join(spaced.split())


def wrapped(sentence: str, room: int) -> Iterator[str]:
    """Lines of at most `room` cells; a longer word, mostly a path, stays in one piece so that it can be copied."""
    from rich.cells import cell_len

    line, used = "", 0
    for word in sentence.split():
        size = cell_len(word)
        if line and used + 1 + size > room:
            yield line
            line, used = word, size
        else:
            line, used = f"{line} {word}".lstrip(), used + size + bool(line)
    if line:
        yield line


def fitted(lines: str, width: int) -> Iterator[str]:
    """Lines of at most `width` cells, as `wrapped`: what does not fit goes on further to the right."""
    from rich.cells import cell_len

    for line in lines.splitlines():
        margin = len(line) - len(line.lstrip())
        parts = [line] if cell_len(line) <= width else wrapped(line, width - margin - 4)
        for place, part in enumerate(parts):
            yield " " * (margin + 4) + part if place else " " * margin + part.lstrip()


def count(number: int, noun: str) -> str:
    """'1 run', '2 runs'."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def number(value: Any, digits: int = 4) -> str:
    """A number for people; '?' for what is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return "?"
    return str(value) if isinstance(value, int) else f"{value:.{digits}g}"


def place(verdict: Verdict, step: int, epoch: float | None) -> str:
    """'step 260, epoch 8.7'; 'epoch 9' where steps are not known."""
    if epoch is None or not math.isfinite(epoch) or verdict.step_unit == "epoch":
        return f"{plain(verdict.step_unit)} {step}"
    return f"step {step}, epoch {epoch:.2g}" if epoch < 1 else f"step {step}, epoch {round(epoch, 1):g}"


def facts(verdict: Verdict) -> str:
    """What the run is: 'peft, lora, 50 checkpoints, steps 20-1000'."""
    known = [plain(value) for value in (verdict.trainer, verdict.adapter) if value]
    known.append(count(verdict.checkpoints, "checkpoint"))
    steps = _pair(verdict, "steps")
    if steps:
        several = f"s {number(steps[0])}-{number(steps[1])}" if steps[0] != steps[1] else f" {number(steps[0])}"
        known.append(f"{plain(verdict.step_unit)}{several}")
    elif verdict.cadence_steps is not None and math.isfinite(verdict.cadence_steps):
        known.append(f"every {verdict.cadence_steps:g} {plain(verdict.step_unit)}s")
    return ", ".join(known)


def headline(verdict: Verdict) -> str:
    """The verdict in one sentence; the status if assess gave no sentence."""
    return plain(verdict.message) or STATUS.get(verdict.status, plain(verdict.status))


def why(verdict: Verdict) -> str:
    """What the checkpoint to keep rests on, with its numbers; the verdict's sentence where there is none."""
    keep = verdict.keep
    if keep is None:
        return headline(verdict)
    reason = RESTS_ON.get(keep.rests_on, plain(keep.rests_on))
    losses = verdict.evidence.get("held_out") if keep.rests_on == "held_out_loss" else None
    known = losses if isinstance(losses, dict) else {}
    if known.get("loss") is not None:
        reason += f": {number(known['loss'])}"
    others = {"last": known.get("last_loss"), "at the turning point": known.get("at_turning_point")}
    compared = ", ".join(f"{name}: {number(loss)}" for name, loss in others.items() if loss is not None)
    if keep.rests_on == "turning_point" and verdict.turning_point is not None:
        compared = _support(verdict)
    if keep.rests_on == "probe":
        reason, compared = _probe(verdict, reason)
    if keep.rests_on == "weights":
        compared = "in tests not shown to beat the middle one"
    return f"{reason} at {place(verdict, keep.step, keep.epoch)}" + (f" ({compared})" if compared else "")


def _probe(verdict: Verdict, reason: str) -> tuple[str, str]:
    """The score, and how much worse the next best is on the same samples."""
    found = verdict.evidence.get("probe")
    known = found if isinstance(found, dict) else {}
    parts = [plain(known["scorer"])] if known.get("scorer") else []
    second = known.get("runner_up")
    if isinstance(second, dict):
        gap = f"{plain(verdict.step_unit)} {number(second.get('step'))} is worse by {number(second.get('worse_by'), 2)}"
        span = second.get("interval")
        noise = f" [{number(span[0], 2)}, {number(span[1], 2)}]" if isinstance(span, list) and len(span) == 2 else ""
        parts.append(gap + noise)
    score = known.get("score")
    return reason if score is None else f"{reason}: {number(score)}", "; ".join(parts)


def probe(verdict: Verdict) -> str:
    """Every checkpoint that a probe scored, with its score; '' where there was none."""
    found = verdict.evidence.get("probe")
    entries = found.get("evaluations") if isinstance(found, dict) else None
    scored = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    unit = plain(verdict.step_unit)
    said = ", ".join(f"{number(entry.get('step'))}: {number(entry.get('score'))}" for entry in scored)
    return f"{unit} {said}" if said else ""


def turning(verdict: Verdict) -> str:
    """Where the turning point is, and the checkpoints that it rests on; '' if there is none, or `why` tells it."""
    point = verdict.turning_point
    if point is None or (verdict.keep is not None and verdict.keep.rests_on == "turning_point"):
        return ""
    return f"second valley at {place(verdict, point.step, point.epoch)} ({_support(verdict)})"


def _support(verdict: Verdict) -> str:
    point = verdict.turning_point
    return f"from {plain(verdict.step_unit)}s {point.step}-{point.support_end_step}" if point else ""


def window(verdict: Verdict) -> str:
    """Which window CS-Fluctuation was computed with, and why; '' if it was not computed."""
    if verdict.window is None:
        return ""
    because = f": {plain(verdict.window_reason)}" if verdict.window_reason else ""
    return f"window {verdict.window}{because}"


def candidates(verdict: Verdict) -> str:
    """Checkpoints worth comparing, each with what speaks for it: by their steps beside one that is kept."""
    keep, unit = verdict.keep, plain(verdict.step_unit)
    if keep is None and len(verdict.candidates) < 2:
        return ""
    if keep is None:
        return "; ".join(f"{plain(entry.checkpoint)} ({plain(entry.why)})" for entry in verdict.candidates)
    others = [entry for entry in verdict.candidates if entry.checkpoint != keep.checkpoint]
    return ", ".join(f"{unit} {entry.step} ({plain(entry.why)})" for entry in others)


def spread(verdict: Verdict) -> str:
    """Where random walks, other windows and resampled modules turn; '' where that is not known."""
    said = []
    band = _pair(verdict, "null_band")
    if band:
        meaning = "no evidence beyond the window" if verdict.evidence.get("inside_null_band") else "this lies outside"
        said.append(f"random walks {number(band[0])}-{number(band[1])} ({meaning})")
    sweep = verdict.evidence.get("window_sweep")
    entries = [entry for entry in sweep if isinstance(entry, dict)] if isinstance(sweep, list) else []
    others = [entry.get("step") for entry in entries if entry.get("window") != verdict.window]
    steps = [step for step in others if isinstance(step, int)]
    if others:
        share = f"{len(others) - len(steps)} of {len(others)} " if steps else ""
        none = f"{share}none" if len(steps) < len(others) else ""
        said.append("other windows " + ", ".join(filter(None, (_range(steps), none))))
    layers = verdict.evidence.get("layer_interval")
    if isinstance(layers, dict):
        said.append(f"resampled modules {number(layers.get('low_step'))}-{number(layers.get('high_step'))}")
    return "; ".join(said)


def _range(steps: list[int]) -> str:
    return "-".join(map(str, dict.fromkeys((min(steps), max(steps))))) if steps else ""


def agreement(verdict: Verdict) -> str:
    """What other quantities say, side by side; '' where none is known."""
    panel = verdict.evidence.get("agreement")
    entries = [entry for entry in panel if isinstance(entry, dict)] if isinstance(panel, list) else []
    known = [(entry.get("indicator"), entry.get("step")) for entry in entries]
    return "; ".join(f"{plain(indicator)}: {number(step)}" for indicator, step in known if step is not None)


def analyses(verdict: Verdict) -> str:
    """What the papers' quantities say, in plain words; '' where none is known."""
    found = verdict.evidence.get("analyses")
    entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    return "; ".join(plain(entry.get("words", "")) for entry in entries)


def untold(verdict: Verdict) -> list[Finding]:
    """Findings that neither the verdict's sentence nor the list of skipped files tells already."""
    files, sentence = {entry.rule or "unreadable-file" for entry in verdict.skipped}, headline(verdict)
    return [f for f in verdict.findings if f.rule not in files and not sentence.startswith(plain(f.message) or "\0")]


def last(verdict: Verdict) -> str:
    """Whether the last checkpoint is past the turning point; '' where that is not known, or a finding says it."""
    if verdict.last_is_past_turning_point is None:
        return ""
    steps = _pair(verdict, "steps")
    where = f" ({plain(verdict.step_unit)} {number(steps[1])})" if steps else ""
    said = f"the last checkpoint{where} is {'' if verdict.last_is_past_turning_point else 'not '}past the turning point"
    return "" if any(plain(finding.message).startswith(said) for finding in verdict.findings) else said


def reasons(skipped: Iterable[Skipped]) -> list[tuple[str, int]]:
    """Why files were skipped, and how many for each reason: most frequent first."""
    return Counter(plain(entry.reason) or "no reason given" for entry in skipped).most_common()


def all_skipped(summary: Summary) -> list[Skipped]:
    """Files that were left out, of all runs and of none."""
    return [entry for verdict in summary.runs for entry in verdict.skipped] + list(summary.skipped)


def totals(summary: Summary) -> str:
    """'3 runs: 2 with a checkpoint to keep, 1 without; 4 files skipped'."""
    kept = sum(verdict.keep is not None for verdict in summary.runs)
    parts = [count(len(summary.runs), "run")]
    if summary.runs:
        parts[0] += f": {kept} with a checkpoint to keep, {len(summary.runs) - kept} without"
    skipped = all_skipped(summary)
    foreign = sum(entry.expected for entry in skipped)
    if len(skipped) > foreign:
        parts.append(f"{count(len(skipped) - foreign, 'file')} skipped")
    if foreign:
        parts.append(f"{count(foreign, 'other file')} {'is no checkpoint' if foreign == 1 else 'are no checkpoints'}")
    ignored = summary.ignored + sum(verdict.ignored for verdict in summary.runs)
    if ignored:
        parts.append(f"{count(ignored, 'finding')} ignored")
    return "; ".join(parts)


def _pair(verdict: Verdict, key: str) -> tuple[Any, Any] | None:
    """Two values of the evidence, which may lack them."""
    pair = verdict.evidence.get(key)
    return (pair[0], pair[1]) if isinstance(pair, (list, tuple)) and len(pair) == 2 else None


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    if character.isspace():
        return " "
    return "\N{REPLACEMENT CHARACTER}" if "\ud800" <= character <= "\udfff" else ""
