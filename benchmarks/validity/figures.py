"""Figures of docs/validity.md."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from candidates import CANDIDATES
from page import FIXED, LEAD, MIDDLE, NULL, PAPER, PAPER_RULES, RECOMMENDED, TRAINING, best_valley, best_with
from results import Results
from score import HORIZONS, interval

COLOURS = {
    "text": "#0072b2",
    "masked": "#56b4e9",
    "image": "#d55e00",
    "diffusion": "#e69f00",
    "table": "#009e73",
}


def draw(results: Results, folder: Path) -> None:
    """All figures."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    _rules(results, folder / "rules.png")
    _checkpoints(results, folder / "checkpoints.png")
    _lead(results, folder / "lead.png")
    _series(results, folder / "series.png")


def _shown(results: Results) -> list[str]:
    names = [RECOMMENDED, TRAINING, best_with(results), best_valley(results), *PAPER_RULES, LEAD]
    names += ["last", MIDDLE, "a quarter", "random (expected)", FIXED, NULL, "knee of the training loss"]
    return list(dict.fromkeys(names))


def _rules(results: Results, path: Path) -> None:
    names = sorted(_shown(results), key=lambda name: -float(results.scores[0][name].lodo.mean()))
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(names) + 1.2))
    groups = (
        ("main set, other domains", lambda name: results.scores[0][name].lodo, "#0072b2", 0.22, "o"),
        ("confirmation set", lambda name: results.confirmed[0][name], "#d55e00", 0.0, "s"),
        ("replication set", lambda name: results.replicated[0][name], "#009e73", -0.22, "^"),
    )
    for label, values, colour, shift, marker in groups:
        for place, name in enumerate(names):
            mean, low, high = interval(values(name))
            axes.plot([low, high], [place + shift] * 2, color=colour, lw=1.5)
            axes.plot(mean, place + shift, marker, color=colour, ms=5, label=label if place == 0 else None)
    axes.axvline(0.05, color="0.6", ls=":", lw=1)
    axes.text(0.052, len(names) - 0.6, "goal", color="0.4", va="bottom")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(left=0)
    axes.set_xlabel("regret (0 best checkpoint, 1 worst), 95 % interval over runs")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    _save(figure, path)


def _checkpoints(results: Results, path: Path) -> None:
    names = [RECOMMENDED, TRAINING, PAPER, "multi-scale", MIDDLE, FIXED, NULL]
    counts = list(results.scores)[::-1]
    labels = [str(count) if count else "all" for count in counts]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True)
    groups = (
        ("main set, other domains", lambda c, n: results.scores[c][n].lodo),
        ("confirmation set", lambda c, n: results.confirmed[c][n]),
        ("replication set", lambda c, n: results.replicated[c][n]),
    )
    for axis, (title, values) in zip(axes, groups, strict=True):
        for place, name in enumerate(dict.fromkeys(names)):
            means = [float(values(count, name).mean()) for count in counts]
            style = "--" if name in (MIDDLE, FIXED, NULL) else "-"
            axis.plot(labels, means, style, marker="o", ms=4, label=name, color=f"C{place}")
        axis.set_title(title, loc="left")
        axis.set_xlabel("checkpoints")
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("regret")
    axes[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def _lead(results: Results, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    families = list(COLOURS)
    random = np.random.default_rng(0)
    for axis, (name, values) in zip(axes, results.best_values.items(), strict=True):
        for place, family in enumerate(families):
            for marker, wanted in (("o", True), ("x", False)):
                own = [v for f, optimiser, v in values if f == family and (optimiser == "adamw") is wanted]
                axis.plot(own, place + random.uniform(-0.2, 0.2, len(own)), marker, color=COLOURS[family], ms=5)
            tau = results.scores[0][name].by_family.get(family)
            if tau:
                axis.plot([tau, tau], [place - 0.38, place + 0.38], color="black", lw=1.5)
        axis.set_xscale("log")
        axis.set_yticks(range(len(families)), families)
        axis.set_xlabel(f"{name}, at the best checkpoint")
    axes[0].plot([], [], "o", color="0.4", label="AdamW")
    axes[0].plot([], [], "x", color="0.4", label="other optimisers")
    axes[0].plot([], [], color="black", label="tau tuned on the family")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, ncols=3, loc="upper center")
    figure.subplots_adjust(top=0.88)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def _series(results: Results, path: Path) -> None:
    families = list(COLOURS)
    figure, axes = plt.subplots(2, len(families), figsize=(13, 4.6), sharex="col")
    shown = {name: candidate for candidate in CANDIDATES if (name := candidate.name) in (PAPER, RECOMMENDED)}
    for column, family in enumerate(families):
        own = [c for c in results.cases[:: len(HORIZONS)] if results.main[c.run].setting["family"] == family]
        case = next((c for c in own if c.regret[-1] > 0.1 and c.regret.argmin() > 5), own[0])
        top, bottom = axes[:, column]
        steps = case.view.steps
        top.plot(steps, case.regret, color="0.3")
        bottom.plot(steps, case.view.columns["cosine"], color=COLOURS[family])
        for (name, candidate), colour in zip(shown.items(), ("#cc79a7", "#0072b2"), strict=True):
            pick = candidate.pick(case.view) if candidate.pick else None
            if pick is not None:
                for axis in (top, bottom):
                    axis.axvline(steps[pick], color=colour, ls="--", lw=1.2, label=name)
        middle = steps[(len(steps) - 1) // 2]
        top.axvline(middle, color="0.6", ls=":", lw=1.2, label="middle")
        top.plot(steps[case.regret.argmin()], 0, "v", color="black", ms=6, clip_on=False)
        top.set_title(f"{family}: {results.main[case.run].setting['domain']}", loc="left", fontsize=9)
        bottom.set_xlabel("step")
    axes[0, 0].set_ylabel("regret of each checkpoint")
    axes[1, 0].set_ylabel("CS (mean over modules)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, ncols=3, loc="lower center")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
