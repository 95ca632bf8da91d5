"""All numbers of the study in one value, and how they are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from candidates import CANDIDATES, Candidate, View, auto_window
from columns import Measured, measure
from holdout import group_losses, group_regret
from numpy.typing import NDArray
from score import CADENCES, HORIZONS, Case, Score, Scored, apply_all, cases_of, external_cases, score, score_all

from lora_forensics.turning_point import cs_fluctuation, valleys

Floats = NDArray[np.float64]
LEAD = "dose * sqrt(rank) / samples"
COUNTERPART = "B moved per row / samples"
FEW = (8, 5, 3)
"""Numbers of checkpoints for which no window fits."""
FEW_RULES = ("half of the path", "half of B's path", "middle", "a quarter", "last", "random (expected)")
HARMFUL = 0.25
"""A run counts as overfitted where its last checkpoint has at least this regret."""


@dataclass(slots=True)
class Results:
    """Everything that the page and the figures show."""

    main: list[Measured]
    confirmation: list[Measured]
    replication: list[Measured]
    cases: list[Case]
    """The main runs at every save."""
    scores: dict[int, dict[str, Score]]
    """Cadence to candidate to score."""
    confirmed: dict[int, dict[str, Floats]]
    """Cadence to candidate to regret on the confirmation set, (runs, horizons)."""
    replicated: dict[int, dict[str, Floats]]
    """The same on the replication set."""
    groups: dict[str, Floats]
    """Set of runs to the mean regret of picks by four held-out samples, (runs, horizons)."""
    few: dict[int, dict[str, dict[str, Floats]]]
    """Very few checkpoints to set (main, fresh) to rule to regret, (runs, horizons)."""
    divided: dict[int, tuple[Floats, Floats]]
    """Cadence to the regret, on main and fresh runs, of the second valley of CS-Fluctuation divided by the rate."""
    external: dict[str, Floats]
    external_runs: int
    adamw: dict[str, Score]
    """Main runs with AdamW alone, for the rules that count learning rates."""
    adamw_runs: int
    best_values: dict[str, list[tuple[str, str, float]]] = field(default_factory=dict)
    """Threshold curve to (family, optimiser, its value at the best checkpoint), one for each main run."""

    @property
    def seconds(self) -> float:
        """Seconds that training took, all runs together."""
        return sum(run.seconds for run in (*self.main, *self.confirmation, *self.replication))


def evaluate(paths: Mapping[str, Sequence[Path]], work: Path, external: Path | None) -> Results:
    """Score everything; `paths` holds the main, the confirmation and the replication set."""
    sets = {name: [measure(path) for path in found] for name, found in paths.items()}
    runs = sets["main"]
    scores = {count: score_all(runs, count) for count in CADENCES}

    def applied(fresh: Sequence[Measured]) -> dict[int, dict[str, Floats]]:
        needs = ("cosine", "weights", "settings", "log")
        return {count: apply_all(cases_of(fresh, count), scores[count], needs) for count in CADENCES}

    older: dict[str, Floats] = {}
    older_runs = 0
    if external:
        cases, _ = external_cases(external, 0)
        older = apply_all(cases, scores[0], ("cosine", "settings", "log"))
        older_runs = len(cases) // len(HORIZONS)
    wanted = {
        LEAD,
        COUNTERPART,
        "dose / samples",
        "dose",
        "B moved per row",
        "fixed step, tuned",
        "c / learning rate, tuned",
        "middle",
        "last",
    }
    adamw = [run for run in runs if run.setting["optimizer"] == "adamw"]
    adamw_cases = cases_of(adamw, 0)
    cases = cases_of(runs, 0)
    return Results(
        main=runs,
        confirmation=sets["confirmation"],
        replication=sets["replication"],
        cases=cases,
        scores=scores,
        confirmed=applied(sets["confirmation"]),
        replicated=applied(sets["replication"]),
        groups={
            name: np.array([group_regret(measure(path), group_losses(path, work)) for path in found])
            for name, found in paths.items()
        },
        few={
            count: {
                "main": _few(runs, count),
                "fresh": _few([*sets["confirmation"], *sets["replication"]], count),
            }
            for count in FEW
        },
        divided={
            count: (_divided(runs, count), _divided([*sets["confirmation"], *sets["replication"]], count))
            for count in CADENCES
        },
        external=older,
        external_runs=older_runs,
        adamw={
            candidate.name: score(candidate, adamw_cases, [run.setting for run in adamw])
            for candidate in CANDIDATES
            if candidate.name in wanted
        },
        adamw_runs=len(adamw),
        best_values={name: _best_values(name, cases, runs) for name in (LEAD, COUNTERPART)},
    )


def _second_valley_divided(view: View) -> int | None:
    """Algorithm 1 at the auto window as the tool computes it: divided by the rate, which moves valleys of schedules."""
    window = auto_window(view)
    found = valleys(cs_fluctuation(view.columns["cosine"], window, view.rate)) if window else ()
    return int(found[1]) if len(found) > 1 else None


def _divided(runs: Sequence[Measured], count: int) -> Floats:
    cases = cases_of(runs, count)
    rule = Candidate("divided by the rate", "paper", _second_valley_divided)
    return Scored(rule, cases).regret(range(len(cases)), None).reshape(-1, len(HORIZONS))


def _few(runs: Sequence[Measured], count: int) -> dict[str, Floats]:
    cases = cases_of(runs, count)
    named = {candidate.name: candidate for candidate in CANDIDATES}
    return {
        name: Scored(named[name], cases).regret(range(len(cases)), None).reshape(-1, len(HORIZONS))
        for name in FEW_RULES
    }


def _best_values(name: str, cases: Sequence[Case], runs: Sequence[Measured]) -> list[tuple[str, str, float]]:
    curve = next(candidate.curve for candidate in CANDIDATES if candidate.name == name)
    assert curve is not None
    found: list[tuple[str, str, float]] = []
    for case in cases[:: len(HORIZONS)]:
        setting: dict[str, Any] = runs[case.run].setting
        found.append((setting["family"], setting["optimizer"], float(curve(case.view)[int(np.argmin(case.regret))])))
    return found


def overfitted(scores: dict[str, Score]) -> NDArray[np.bool_]:
    """Which runs and horizons end at least `HARMFUL` above their best checkpoint: (runs, horizons)."""
    return scores["last"].lodo >= HARMFUL
