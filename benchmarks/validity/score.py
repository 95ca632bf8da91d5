"""Scores every candidate: regret on held-out loss, constants tuned on other domains or other families only.

Regret of a pick = (held-out loss there - lowest) / (highest - lowest) over the checkpoints of the horizon, where
highest includes the untrained model. 0 is the best checkpoint, 1 the worst. A rule that names nothing keeps the middle
checkpoint; a threshold that is never reached keeps the last. Each run counts at three horizons (all of it, its first
half, its first quarter), since nobody knows beforehand how long a run should be; intervals resample whole runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from candidates import CANDIDATES, Candidate, View
from columns import Measured
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingRegressor

Floats = NDArray[np.float64]

HORIZONS = (1.0, 0.5, 0.25)
CADENCES = (0, 40, 20, 10)
"""Checkpoints a horizon; 0: every save, which is 160, 80 and 40."""
TEXTS, PICTURES = ("text", "masked"), ("image", "diffusion")
QUANTILES = np.linspace(0.005, 0.995, 60)
RESAMPLES = 4000


@dataclass(slots=True)
class Case:
    """One run at one horizon and cadence."""

    run: int
    view: View
    regret: Floats
    """Regret of each checkpoint: (n,)."""


@dataclass(slots=True)
class Score:
    """How one candidate fared at one cadence. Arrays are (runs, horizons)."""

    lodo: Floats
    """Constant tuned without the run's domain."""
    lofo: Floats
    """Constant tuned without the run's family."""
    to_pictures: float
    """Tuned on text, mean regret on pictures."""
    to_text: float
    """Tuned on pictures, mean regret on text."""
    constant: Any
    """Tuned on all main runs: what the confirmation set is scored with."""
    missing: float
    """Share of cases without a pick."""
    by_family: dict[str, Any] = field(default_factory=dict)
    """The best constant of each family by itself."""


def case_of(run: Measured, number: int, share: float, count: int) -> Case:
    """Cut a run at a horizon and thin its checkpoints evenly."""
    saves = int(len(run.log["step"]) * share)
    stride = saves // count if count else 1
    kept = np.arange(stride - 1, saves, stride)
    columns = {name: values[kept].mean(axis=1) for name, values in run.modules.items()}
    train = run.log["train"][: len(kept) * stride].reshape(len(kept), stride).mean(axis=1)
    pairs = np.ix_(kept, kept)
    view = View(
        steps=run.log["step"][kept],
        columns=columns,
        cosines=run.modules["cosine"][kept],
        gram=run.gram[pairs],
        gram_up=run.gram_up[pairs],
        rate=run.log["rate"][kept],
        dose=run.log["dose"][kept],
        train=train,
        setting=run.setting,
    )
    return Case(number, view, regrets(run.log["held_out"][kept], float(run.log["untrained"][0])))


def regrets(held_out: Floats, untrained: float) -> Floats:
    """Regret of every checkpoint."""
    lowest = held_out.min()
    return (held_out - lowest) / (max(held_out.max(), untrained, lowest + 1e-12) - lowest)


def cases_of(runs: Sequence[Measured], count: int) -> list[Case]:
    """All runs at all horizons, run by run."""
    return [case_of(run, number, share, count) for number, run in enumerate(runs) for share in HORIZONS]


def external_cases(folder: Path, count: int) -> tuple[list[Case], list[dict[str, Any]]]:
    """The runs of the earlier study: CS per layer every fifth step, no factors."""
    index = pl.read_parquet(folder / "index.parquet")
    table = pl.read_parquet(folder / "runs.parquet").with_columns(pl.col("run", "layer").cast(pl.String))
    cases, settings = [], []
    for number, row in enumerate(index.iter_rows(named=True)):
        own = table.filter(pl.col("run") == row["name"])
        flat = own.pivot(on="layer", index="step", values="cs_flat").sort("step")
        rowwise = own.group_by("step").agg(pl.col("cs_rows").mean()).sort("step")["cs_rows"].to_numpy()
        logs = own.group_by("step").agg(pl.col("val_loss", "train_loss", "lr").first()).sort("step")
        setting = {"rank": row["r"], "alpha": row["alpha"], "samples": row["n"], "batch": row["bs"]}
        setting |= {"domain": row["domain"], "family": "text" if row["domain"] in ("de", "py", "chlog") else "image"}
        settings.append(setting | {"name": row["name"], "steps": row["steps"]})
        steps = flat["step"].to_numpy().astype(np.float64)
        cosines = flat.drop("step").to_numpy().astype(np.float64)
        dose = np.cumsum(logs["lr"].to_numpy() * np.diff(steps, prepend=0))
        for share in HORIZONS:
            saves = int(len(steps) * share)
            stride = max(1, saves // count) if count else 1
            kept = np.arange(stride - 1, saves, stride)
            view = View(
                steps=steps[kept],
                columns={"cosine": cosines[kept].mean(axis=1), "cosine_rowwise": rowwise[kept].astype(np.float64)},
                cosines=cosines[kept],
                gram=None,
                gram_up=None,
                rate=logs["lr"].to_numpy().astype(np.float64)[kept],
                dose=dose[kept],
                train=logs["train_loss"].to_numpy().astype(np.float64)[kept],
                setting=setting,
            )
            held_out = logs["val_loss"].to_numpy().astype(np.float64)[kept]
            cases.append(Case(number, view, regrets(held_out, row["val0"])))
    return cases, settings


class Scored:
    """One candidate on a list of cases: what it picks for every constant."""

    def __init__(self, candidate: Candidate, cases: Sequence[Case]) -> None:
        """Everything that does not depend on the folds is computed here."""
        self._candidate = candidate
        self._cases = cases
        self.missing = 0.0
        if candidate.features is not None:
            self._curves = [candidate.features(case.view) for case in cases]
        elif candidate.curve is not None:
            self._curves = [np.maximum.accumulate(_finite(candidate.curve(case.view))) for case in cases]
        else:
            self._fixed = self._fixed_regrets()

    def _fixed_regrets(self) -> Floats:
        """(cases, constants)."""
        candidate = self._candidate
        rows = []
        for case in self._cases:
            if candidate.pick is not None:
                picks = [candidate.pick(case.view)]
            else:
                assert candidate.choose is not None
                picks = [candidate.choose(case.view, constant) for constant in candidate.grid]
            self.missing += sum(pick is None for pick in picks) / len(picks) / len(self._cases)
            rows.append([_regret(case, pick) for pick in picks])
        return np.array(rows)

    def tune(self, training: Sequence[int]) -> Any:
        """The constant with the lowest mean regret on these cases; None where there is nothing to tune."""
        candidate = self._candidate
        if not candidate.tuned:
            return None
        if candidate.features is not None:
            inputs = np.concatenate([self._curves[place] for place in training])
            targets = np.concatenate([self._cases[place].regret for place in training])
            model = HistGradientBoostingRegressor(max_depth=3, max_iter=80, random_state=25)
            return model.fit(inputs, targets)
        if candidate.curve is None:
            return candidate.grid[int(np.argmin(self._fixed[list(training)].mean(axis=0)))]
        pooled = np.concatenate([self._curves[place] for place in training])
        grid = np.unique(np.quantile(pooled, QUANTILES))
        means = np.mean([self._at(place, grid) for place in training], axis=0)
        return float(grid[int(np.argmin(means))])

    def regret(self, tested: Iterable[int], constant: Any) -> Floats:
        """Regret of these cases with a constant."""
        if constant is None:
            return self._fixed[list(tested), 0]
        if self._candidate.features is not None:
            picks = [(place, int(np.argmin(constant.predict(self._curves[place])))) for place in tested]
            return np.array([self._cases[place].regret[pick] for place, pick in picks])
        if self._candidate.curve is None:
            return self._fixed[list(tested), self._candidate.grid.index(constant)]
        return np.array([self._at(place, np.array([constant]))[0] for place in tested])

    def _at(self, place: int, grid: Floats) -> Floats:
        """Regret of one case for every threshold."""
        regret = self._cases[place].regret
        return regret[np.minimum(np.searchsorted(self._curves[place], grid), len(regret) - 1)]


def _finite(curve: Floats) -> Floats:
    return np.nan_to_num(np.asarray(curve, dtype=np.float64), nan=-np.inf, posinf=1e300, neginf=-1e300)


def _regret(case: Case, pick: int | None) -> float:
    if pick is None:
        pick = (case.view.count - 1) // 2
    return float(case.regret.mean()) if pick < 0 else float(case.regret[pick])


def score(candidate: Candidate, cases: Sequence[Case], settings: Sequence[dict[str, Any]]) -> Score:
    """Leave one domain out, leave one family out, and both transfers."""
    scored = Scored(candidate, cases)
    domains = [f"{settings[case.run]['family']}/{settings[case.run]['domain']}" for case in cases]
    families = [settings[case.run]["family"] for case in cases]
    everything = list(range(len(cases)))

    def folds(keys: Sequence[str]) -> Floats:
        out = np.empty(len(cases))
        for key in sorted(set(keys)):
            tested = [place for place in everything if keys[place] == key]
            constant = scored.tune([place for place in everything if keys[place] != key])
            out[tested] = scored.regret(tested, constant)
        return out.reshape(-1, len(HORIZONS))

    def transfer(source: Sequence[str], target: Sequence[str]) -> float:
        constant = scored.tune([place for place in everything if families[place] in source])
        return float(scored.regret([p for p in everything if families[p] in target], constant).mean())

    own = {
        family: constant
        for family in dict.fromkeys(families)
        if (constant := scored.tune([p for p in everything if families[p] == family])) is not None
    }
    return Score(
        folds(domains),
        folds(families),
        transfer(TEXTS, PICTURES),
        transfer(PICTURES, TEXTS),
        scored.tune(everything),
        scored.missing,
        own,
    )


def score_all(runs: Sequence[Measured], count: int) -> dict[str, Score]:
    """Every candidate at one cadence."""
    cases, settings = cases_of(runs, count), [run.setting for run in runs]
    return {candidate.name: score(candidate, cases, settings) for candidate in CANDIDATES}


def apply_all(cases: Sequence[Case], scores: dict[str, Score], possible: Sequence[str]) -> dict[str, Floats]:
    """Every candidate whose needs are met on other cases, constants as tuned on all main runs: (runs, horizons)."""
    found = {}
    for candidate in CANDIDATES:
        if candidate.needs in possible:
            scored = Scored(candidate, cases)
            regret = scored.regret(range(len(cases)), scores[candidate.name].constant)
            found[candidate.name] = regret.reshape(-1, len(HORIZONS))
    return found


def interval(values: Floats) -> tuple[float, float, float]:
    """Mean over runs, and its 95 % interval by resampling runs; values (runs, horizons)."""
    means = values.mean(axis=1)
    random = np.random.default_rng(24)
    drawn = means[random.integers(len(means), size=(RESAMPLES, len(means)))].mean(axis=1)
    return float(means.mean()), float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))
