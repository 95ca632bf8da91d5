"""What can be compared between runs, and what cannot: told from their settings, never from the numbers."""

from __future__ import annotations

from collections.abc import Sequence

from lora_forensics.comparison.values import Compared

_TASK = ("trainer", "family", "base")
_DATA = ("samples", "images", "sets", "resolution")
_READ = ("similarity", "scope")
_CHANGES: dict[str, tuple[tuple[str, ...], str]] = {
    "cosine": (("base", "modules", *_READ), "levels belong to each run: compare courses"),
    "cs_fluctuation": (("base", "modules", "window", *_READ), "levels belong to each run: compare courses"),
    "path_length": (("base", "modules", "scope"), "a sum over modules: compare courses"),
    "mean_relative_norm": (("base", "modules", "scope"), "means of other modules"),
    "mean_effective_rank": (("modules", "scope"), "means of other modules"),
}
"""Measure to the settings that must be the same for its values to mean the same, and what holds where they are not."""
_LOSSES = {
    "held_out_loss": (
        ": compare checkpoints of one run",
        "comparable only if all runs held out the same data, which no file says",
    ),
    "train_loss": ("", "lower means fitted more closely, not better"),
}
"""Loss to what holds where task or data differ, and where nothing is known to."""
_ABOUT = "about "


def notes(runs: Sequence[Compared]) -> dict[str, str]:
    """Measure to a sentence about how far runs can be compared by it; only where at least two runs have it."""
    said = {}
    for measure, (names, instead) in _CHANGES.items():
        own = _having(runs, measure)
        if len(own) > 1 and (found := _unlike(own, names)):
            said[measure] = f"different {', '.join(found)}: {instead}"
    for measure, (instead, otherwise) in _LOSSES.items():
        own = _having(runs, measure)
        if len(own) > 1:
            found = _unlike(own, (*_TASK, *_DATA))
            said[measure] = (
                f"not comparable between runs (different {', '.join(found)}){instead}" if found else otherwise
            )
    return said


def alike(runs: Sequence[Compared]) -> list[list[int]]:
    """Places of runs with held-out losses of the same trainer, base and amount of data, as far as files say."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for place, run in enumerate(runs):
        if _having([run], "held_out_loss"):
            groups.setdefault(tuple(run.settings.get(name, "?") for name in (*_TASK, *_DATA)), []).append(place)
    return list(groups.values())


def _having(runs: Sequence[Compared], measure: str) -> list[Compared]:
    return [run for run in runs if run.course[measure].is_finite().any()]


def _unlike(runs: Sequence[Compared], names: Sequence[str]) -> list[str]:
    """Settings that are known to differ; two estimates that lie within a tenth of each other do not."""
    return [name for name in names if _differ([run.settings.get(name, "?") for run in runs])]


def _differ(values: Sequence[str]) -> bool:
    known = set(values) - {"?"}
    if any(value.startswith(_ABOUT) for value in known):
        try:
            numbers = [float(value.removeprefix(_ABOUT)) for value in known]
        except ValueError:
            return True
        return max(numbers) > 1.1 * min(numbers)
    return len(known) > 1
