"""All numbers of the study in one value, and how they are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from candidates import CANDIDATES
from columns import Measured, measure
from numpy.typing import NDArray
from score import CADENCES, HORIZONS, Case, Score, Scored, apply_all, cases_of, external_cases, score, score_all

Floats = NDArray[np.float64]
LEAD = "dose * sqrt(rank) / samples"
COUNTERPART = "B moved per row / samples"
HARMFUL = 0.25
"""A run counts as overfitted where its last checkpoint has at least this regret."""


@dataclass(slots=True)
class Results:
    """Everything that the page and the figures show."""

    main: list[Measured]
    confirmation: list[Measured]
    cases: list[Case]
    """The main runs at every save."""
    scores: dict[int, dict[str, Score]]
    """Cadence to candidate to score."""
    confirmed: dict[int, dict[str, Floats]]
    """Cadence to candidate to regret on the confirmation set, (runs, horizons)."""
    confirmation_missing: dict[str, float]
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
        return sum(run.seconds for run in (*self.main, *self.confirmation))


def evaluate(main: Sequence[Path], confirmation: Sequence[Path], external: Path | None) -> Results:
    """Score everything."""
    runs, fresh = [measure(path) for path in main], [measure(path) for path in confirmation]
    scores = {count: score_all(runs, count) for count in CADENCES}
    confirmed = {
        count: apply_all(cases_of(fresh, count), scores[count], ("cosine", "weights", "settings", "log"))
        for count in CADENCES
    }
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
        confirmation=fresh,
        cases=cases,
        scores=scores,
        confirmed=confirmed,
        confirmation_missing={
            candidate.name: Scored(candidate, cases_of(fresh, 0)).missing for candidate in CANDIDATES
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
