"""docs/validity.md from the numbers: every figure on the page is computed here."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import probe
from candidates import CANDIDATES, Candidate
from numpy.typing import NDArray
from results import COUNTERPART, HARMFUL, LEAD, Results, overfitted
from score import HORIZONS, Score, interval
from settings import CONFIRMATION_DOMAINS, MAIN_DOMAINS, SAVES

Floats = NDArray[np.float64]
GOAL = 0.05
BY_NAME = {candidate.name: candidate for candidate in CANDIDATES}
FIXED, MIDDLE, NULL = "fixed step, tuned", "middle", "random walk, auto window"
PAPER = "algorithm1, auto window"
BASELINES = (
    "last",
    MIDDLE,
    "a quarter",
    "random (expected)",
    "fraction of T, tuned",
    FIXED,
    "c / learning rate, tuned",
    NULL,
    "random walk, multi-scale",
    "knee of the training loss",
    "lowest training loss",
)
PAPER_RULES = (PAPER, "official code, auto window", "algorithm1, M = T/10", "algorithm1, M = T/15", "multi-scale")
TRAINING = "training loss against its start"
RECOMMENDED = "half of the path"
"""Named in PREREGISTERED.txt; needs only columns that the tool has for every kind of adapter."""


def write(results: Results, path: Path, unchanged: bool, small: bool) -> None:
    """Write the page."""
    parts = [
        _head(results, unchanged, small),
        _short_answer(results),
        _advice(results),
        _main_table(results),
        _cadences(results),
        _lead(results),
        _confirmation(results),
        _held_out(results),
        probe.section(path),
        _external(results),
        _methods(results),
        _limits(results),
        _all(results),
    ]
    blocks = [block for part in parts for block in part.strip().split("\n\n") if block.strip()]
    path.write_text("\n\n".join(reflow(block) for block in blocks) + "\n", "utf-8")


def reflow(block: str) -> str:
    """Break paragraphs and list items at 120 columns; tables, headings and pictures stay."""
    if block.startswith(("|", "#", "!")):
        return block
    items: list[str] = []
    for line in block.splitlines():
        if not items or re.match(r"(- |\d+\. )", line):
            items.append(line)
        else:
            items[-1] += " " + line.strip()
    indent = [" " * len(match[0]) if (match := re.match(r"(- |\d+\. )", item)) else "" for item in items]
    return "\n".join(
        textwrap.fill(item, 120, subsequent_indent=space, break_long_words=False, break_on_hyphens=False)
        for item, space in zip(items, indent, strict=True)
    )


# --- which rules the page speaks of ---------------------------------------------------------------------------------


def pooled(results: Results, name: str) -> float:
    """Mean over the cadences of the regret on other domains."""
    return float(np.mean([scores[name].lodo.mean() for scores in results.scores.values()]))


def best_without(results: Results) -> str:
    """The rule without a constant, baselines aside, that is best on the main set over all cadences."""
    names = [c.name for c in CANDIDATES if not c.tuned and c.ideas != "baseline" and c.needs != "log"]
    return min(names, key=lambda name: pooled(results, name))


def best_with(results: Results) -> str:
    """The same with a constant or a taught model."""
    names = [c.name for c in CANDIDATES if c.tuned and c.ideas != "baseline"]
    return min(names, key=lambda name: pooled(results, name))


def best_valley(results: Results) -> str:
    """The best rule without a constant that looks for valleys against steps, and names one in most cases."""
    kinds = ("paper", "windows", "prominence", "joint evidence")
    names = [c.name for c in CANDIDATES if not c.tuned and c.ideas in kinds and results.scores[0][c.name].missing < 0.5]
    return min(names, key=lambda name: pooled(results, name))


# --- small pieces ---------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, first column left, the others right."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def mean_interval(values: Floats) -> str:
    """0.123 [0.100, 0.140]."""
    mean, low, high = interval(values)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def difference(values: Floats, others: Floats) -> str:
    """-0.012 [-0.030, +0.005], over the same runs."""
    mean, low, high = interval(values - others)
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def verdict(values: Floats, others: Floats) -> str:
    """better, worse, or not distinguishable, by the interval of the difference."""
    _, low, high = interval(values - others)
    return "better" if high < 0 else "worse" if low > 0 else "not distinguishable"


def _kind(candidate: Candidate) -> str:
    return "taught" if candidate.features else "tuned" if candidate.tuned else "none"


def _lodo(results: Results, name: str) -> Floats:
    return results.scores[0][name].lodo


# --- sections -------------------------------------------------------------------------------------------------------


def _head(results: Results, unchanged: bool, small: bool) -> str:
    note = (
        "The candidates and the scoring were fixed before the confirmation set was trained: "
        "`benchmarks/validity/PREREGISTERED.txt` has the time, their hashes, and every change since (imports only)."
        if unchanged
        else "The candidates or the scoring differ from `benchmarks/validity/PREREGISTERED.txt`: "
        "here the confirmation set is no longer untouched."
    )
    size = (
        "\n\n**This is the small set: one run a domain. Its numbers only show that the study runs.**" if small else ""
    )
    return f"""# How well can saved checkpoints tell where to stop?

Made by `python benchmarks/validity/run.py`; every number here comes from that command. {len(results.main)} small real
PEFT LoRA runs in {len(MAIN_DOMAINS)} families and {sum(map(len, MAIN_DOMAINS.values()))} domains, {len(CANDIDATES)}
rules,
{len(results.confirmation)} runs of new domains and larger models that were trained afterwards, and then
{len(results.replication)} more of these domains. {note}{size}

**Regret** is the measure: (held-out loss at the pick - lowest) / (highest - lowest), 0 for the best checkpoint and
1 for the worst, the untrained model included. Each run counts at three lengths: whole, first half, first quarter.
Brackets are 95 % intervals from resampling runs."""


def _short_answer(results: Results) -> str:
    answers = (_goal, _paper, _without, _with, _valleys, _lead_answer, _training_length, _few_answer, _files)
    lines = [f"{number}. {answer(results)}" for number, answer in enumerate(answers, start=1)]
    return "## Short answer\n\n" + "\n".join(lines) + "\n\n" + _pictures()


def _goal(results: Results) -> str:
    scores = results.scores[0]
    names = [candidate.name for candidate in CANDIDATES]
    lowest = min(names, key=lambda name: float(scores[name].lodo.mean()))
    fixed = _lodo(results, FIXED)
    reached = [n for n in names if scores[n].lodo.mean() <= GOAL and verdict(scores[n].lodo, fixed) == "better"]
    found = (
        f"Reached by {', '.join(reached)}."
        if reached
        else f"**Nothing reaches it**; the lowest of {len(names)} is *{lowest}* with {scores[lowest].lodo.mean():.3f}."
    )
    return f"**The goal was a regret of {GOAL} on domains that a rule was not tuned on.** {found}"


def _paper(results: Results) -> str:
    paper, middle, null = (_lodo(results, name) for name in (PAPER, MIDDLE, NULL))
    outcome = verdict(paper, middle)
    return (
        f"**The paper's second valley at the tool's `auto` window is {outcome} "
        f"{'from' if outcome == 'not distinguishable' else 'than'} the middle checkpoint**: "
        f"{mean_interval(paper)} against "
        f"{mean_interval(middle)}, difference {difference(paper, middle)}. Where a random walk of the "
        f"same length would put "
        f"it: {null.mean():.3f}, difference {difference(paper, null)} ({verdict(paper, null)}). "
        f"{_capital(_fresh(results, PAPER, MIDDLE))}."
    )


def _fresh(results: Results, name: str, other: str) -> str:
    """How a rule fared against another on both fresh sets."""
    parts = [
        f"{label} {found[0][name].mean():.3f}, minus the {other} {difference(found[0][name], found[0][other])}"
        for label, found in (("confirmation set", results.confirmed), ("replication set", results.replicated))
    ]
    return "; ".join(parts)


def _without(results: Results) -> str:
    name = RECOMMENDED
    own = _lodo(results, name)
    tens = results.scores[10]
    ranked = sorted((pooled(results, c.name), c.name) for c in CANDIDATES if not c.tuned and c.needs != "log")
    near = ", ".join(f"*{other}* {value:.3f}" for value, other in ranked[:4])
    return (
        "**Without a tuned constant, the half-way rules have the best record**; of these "
        f"*{name}* was named before the "
        f"fresh sets were trained: {mean_interval(own)}; minus the middle "
        f"{difference(own, _lodo(results, MIDDLE))}, minus the tuned fixed step "
        f"{difference(own, _lodo(results, FIXED))}, minus the random-walk constant "
        f"{difference(own, _lodo(results, NULL))}, minus `algorithm1` "
        f"{difference(own, _lodo(results, PAPER))}. With 10 "
        f"checkpoints, minus the middle {difference(tens[name].lodo, tens[MIDDLE].lodo)}. "
        f"{_capital(_fresh(results, name, MIDDLE))}. "
        "The path is the sum of the distances between neighbouring checkpoints, all modules together; the rule keeps "
        "the first checkpoint at which half is covered. It sees no overfitting: it is a middle that counts movement "
        "instead of steps, and moves forward where training has come to rest. Over all cadences, the first four "
        f"without a constant: {near}."
    )


def _with(results: Results) -> str:
    name = best_with(results)
    share = (
        f"*{name}* (over all cadences {pooled(results, name):.3f}; at every save {_lodo(results, name).mean():.3f}; "
        f"{_fresh(results, name, MIDDLE)})"
    )
    older = (
        f" On the older runs it has {results.external[TRAINING].mean():.3f}, the middle "
        f"{results.external[MIDDLE].mean():.3f}: there its constant does not fit."
        if results.external and results.external[TRAINING].mean() > results.external[MIDDLE].mean()
        else ""
    )
    constant = -results.scores[0][TRAINING].constant
    return (
        f"**With a constant, thus a *prior***: {share}, and *{TRAINING}* (the first checkpoint at "
        f"which the training loss "
        f"is at {constant:.2f} of its first value): {mean_interval(_lodo(results, TRAINING))}, minus the middle "
        f"{difference(_lodo(results, TRAINING), _lodo(results, MIDDLE))}; "
        f"{_fresh(results, TRAINING, MIDDLE)}.{older} The "
        "training loss is in the trainer's log, not in the files."
    )


def _valleys(results: Results) -> str:
    name = best_valley(results)
    along, walk = (
        _lodo(results, n) for n in ("multi-scale, latest, over path", "random walk over path, multi-scale, latest")
    )
    return (
        f"**Valleys of CS-Fluctuation.** The best rule of that kind, *{name}*, has "
        f"{_lodo(results, name).mean():.3f}, minus "
        f"the middle {difference(_lodo(results, name), _lodo(results, MIDDLE))}; "
        f"{_fresh(results, name, MIDDLE)}. *multi-scale* "
        f"has {_lodo(results, 'multi-scale').mean():.3f}, a random walk in its place "
        f"{_lodo(results, 'random walk, multi-scale').mean():.3f}. Over path instead of steps the best of them has "
        f"{along.mean():.3f}, and a random walk in its place {walk.mean():.3f} (difference {difference(along, walk)}: "
        f"{verdict(along, walk)}): what helps is the path, not the valley."
    )


def _lead_answer(results: Results) -> str:
    lead = _lodo(results, LEAD)
    return (
        f"**The lead `{LEAD}` is {_lead_verdict(results)}**: {mean_interval(lead)}, minus the tuned fixed step "
        f"{difference(lead, _lodo(results, FIXED))}, minus the middle {difference(lead, _lodo(results, MIDDLE))}; "
        f"{_fresh(results, LEAD, MIDDLE)}. Its weights-only counterpart, the movement of B per output row and sample: "
        f"{mean_interval(_lodo(results, COUNTERPART))}. Their thresholds do not carry over between families (below)."
    )


def _training_length(results: Results) -> str:
    scores = results.scores[0]
    wrong = overfitted(scores)
    names = (RECOMMENDED, MIDDLE, "a quarter", "multi-scale", PAPER, "last")
    parts = [f"*{n}* {scores[n].lodo[wrong].mean():.3f} and {scores[n].lodo[~wrong].mean():.3f}" for n in names]
    return (
        f"**How far past overfitting a run went decides which rule is good**, and no rule finds out. In the "
        f"{wrong.mean():.0%} of cases that end with a regret of {HARMFUL} or more, and in the others: "
        f"{', '.join(parts)}. "
        "Early rules win where training was far too long, late ones where it was not."
    )


def _few_answer(results: Results) -> str:
    parts = [
        f"{count}: *{RECOMMENDED}* {found['main'][RECOMMENDED].mean():.3f} and "
        f"{found['fresh'][RECOMMENDED].mean():.3f}, "
        f"*{MIDDLE}* {found['main'][MIDDLE].mean():.3f} and {found['fresh'][MIDDLE].mean():.3f}"
        for count, found in results.few.items()
    ]
    return (
        "**With few checkpoints no valley can be found, and little is lost**: the second valley at the `auto` window "
        f"names nothing in {results.scores[10][PAPER].missing:.0%} of cases at 10 checkpoints. Regret among "
        f"so many checkpoints, "
        f"main and fresh sets: {'; '.join(parts)}."
    )


def _files(results: Results) -> str:
    names = ("learned from the files", "learned from files, settings and training loss")
    values = [f"{_lodo(results, name).mean():.3f}" for name in names]
    groups = results.groups["main"]
    return (
        f"**More curves do not help; held-out data does.** Boosted trees taught on all curves of the files reach "
        f"{values[0]}, with settings and training loss {values[1]}. The loss of four held-out "
        f"samples, at 40 checkpoints, "
        f"reaches {mean_interval(groups)} (confirmation set "
        f"{results.groups['confirmation'].mean():.3f}, replication set "
        f"{results.groups['replication'].mean():.3f})."
    )


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _pictures() -> str:
    return """![One run of each family: regret, CS and picks](images/validity/series.png)

![Regret of the main rules with intervals](images/validity/rules.png)

![Regret by number of checkpoints](images/validity/checkpoints.png)"""


def _principal(results: Results) -> list[str]:
    """Rules of the main tables: what the page speaks of, the next best, the paper's, baselines."""
    chosen = list(dict.fromkeys([RECOMMENDED, TRAINING, best_without(results), best_with(results)]))
    ranked = sorted((c.name for c in CANDIDATES if c.ideas != "baseline"), key=lambda name: pooled(results, name))
    chosen += [name for name in ranked if name not in chosen][:8]
    chosen += [name for name in (best_valley(results), *PAPER_RULES, LEAD, COUNTERPART) if name not in chosen]
    return chosen + list(BASELINES)


def _main_table(results: Results) -> str:
    scores = results.scores[0]
    wrong = overfitted(scores)
    rows = []
    for name in _principal(results):
        own: Score = scores[name]
        rows.append(
            (
                name,
                _kind(BY_NAME[name]),
                mean_interval(own.lodo),
                difference(own.lodo, scores[FIXED].lodo),
                difference(own.lodo, scores[MIDDLE].lodo),
                difference(own.lodo, scores[NULL].lodo),
                f"{own.lodo[wrong].mean():.3f}",
                f"{own.lodo[~wrong].mean():.3f}",
            )
        )
    head = (
        "rule",
        "constant",
        "regret, other domains",
        "minus fixed step",
        "minus middle",
        "minus random walk",
        "overfitted",
        "others",
    )
    return f"""## Regret at every save ({SAVES}, {SAVES // 2} and {SAVES // 4} checkpoints)

Constants are tuned on the other {sum(map(len, MAIN_DOMAINS.values())) - 1} domains. "Overfitted" are the
{int(wrong.sum())} of {wrong.size} cases whose last checkpoint has a regret of {HARMFUL} or more; nobody knows
beforehand
which these are.

{table(head, rows)}

The best lines of many are optimistic: {len(CANDIDATES)} rules were scored. The confirmation set below is not."""


def _cadences(results: Results) -> str:
    names = [name for name in _principal(results) if name != "last"]
    head = ("rule", "every save", *(f"{count} checkpoints" for count in list(results.scores)[1:]))
    rows = [(name, *(f"{scores[name].lodo.mean():.3f}" for scores in results.scores.values())) for name in names]
    counts = table(
        ("checkpoints", "second valley, auto window", "no pick", "middle", "difference", "verdict"),
        [
            (
                str(count) if count else "every save",
                f"{scores[PAPER].lodo.mean():.3f}",
                f"{scores[PAPER].missing:.0%}",
                f"{scores[MIDDLE].lodo.mean():.3f}",
                difference(scores[PAPER].lodo, scores[MIDDLE].lodo),
                verdict(scores[PAPER].lodo, scores[MIDDLE].lodo),
            )
            for count, scores in results.scores.items()
        ],
    )
    few = table(
        ("rule", *(f"{count} checkpoints, {label}" for count in results.few for label in ("main", "fresh"))),
        [
            (
                name,
                *(f"{found[label][name].mean():.3f}" for found in results.few.values() for label in ("main", "fresh")),
            )
            for name in next(iter(results.few.values()))["main"]
        ],
    )
    both = _both(results)
    divided = table(
        ("checkpoints", "main", "minus undivided", "minus middle", "fresh sets", "minus middle"),
        [
            (
                str(count) if count else "every save",
                f"{main.mean():.3f}",
                difference(main, results.scores[count][PAPER].lodo),
                difference(main, results.scores[count][MIDDLE].lodo),
                f"{fresh.mean():.3f}",
                difference(fresh, both[count][MIDDLE]),
            )
            for count, (main, fresh) in results.divided.items()
        ],
    )
    return f"""## By number of checkpoints

Users have few checkpoints. Here each horizon is thinned to that many even ones, and regret counts within these.

{table(head, rows)}

Fewer still, where no window fits (fresh sets: both together):

{few}

`algorithm1` with the tool's `auto` window against the middle checkpoint (no pick counts as the middle):

{counts}

The rules above leave out Eq. 4's division by the learning rate, as the released code does. With it, as the tool's
`algorithm1` has it:

{divided}"""


def _lead_verdict(results: Results) -> str:
    lead, fixed = _lodo(results, LEAD), _lodo(results, FIXED)
    fresh = results.confirmed[0]
    good = lead.mean() <= GOAL and verdict(lead, fixed) == "better"
    ahead = verdict(lead, fixed) == "better" and difference(fresh[LEAD], fresh[FIXED]).startswith("-")
    if good and ahead:
        return "confirmed"
    return "confirmed against the fixed step only, and far from the goal" if ahead else "refuted"


def _lead(results: Results) -> str:
    scores = results.scores[0]
    names = (LEAD, "dose / samples", "dose", COUNTERPART, "B moved per row", FIXED, "c / learning rate, tuned", MIDDLE)
    rows = [
        (
            name,
            mean_interval(scores[name].lodo),
            f"{scores[name].lofo.mean():.3f}",
            f"{scores[name].to_pictures:.3f}",
            f"{scores[name].to_text:.3f}",
            f"{results.adamw[name].lodo.mean():.3f}",
            f"{results.confirmed[0][name].mean():.3f}",
            f"{results.replicated[0][name].mean():.3f}",
        )
        for name in names
    ]
    head = (
        "rule",
        "other domains",
        "other families",
        "text to pictures",
        "pictures to text",
        f"AdamW only ({results.adamw_runs})",
        "confirmation",
        "replication",
    )
    families = list(scores[LEAD].by_family)
    constants = [
        (name, *(f"{results.scores[0][name].by_family[family]:.3g}" for family in families))
        for name in (LEAD, COUNTERPART)
    ]
    spreads = {
        name: max(scores[name].by_family.values()) / min(scores[name].by_family.values())
        for name in (LEAD, COUNTERPART)
    }
    medians = [
        (
            name,
            *(
                f"{np.median([v for f, _, v in results.best_values[name] if f == family]):.3g} "
                f"({np.quantile([v for f, _, v in results.best_values[name] if f == family], 0.1):.2g} .. "
                f"{np.quantile([v for f, _, v in results.best_values[name] if f == family], 0.9):.2g})"
                for family in families
            ),
        )
        for name in (LEAD, COUNTERPART)
    ]
    adamw = results.adamw
    return f"""## The lead: dose * sqrt(rank) / samples

An earlier study on 50 runs left a rule of hyper-parameters: keep the first checkpoint at which the sum of learning
rates
* sqrt(rank) / training samples reaches tau. For optimisers like Adam it says how far B can have moved per output row;
the same from the files is the root mean square length of B's rows, per sample. Here both meet fresh families, five
optimisers, 8 to 80 samples and batches of 1 to 30.

{table(head, rows)}

With AdamW alone: minus the fixed step {difference(adamw[LEAD].lodo, adamw[FIXED].lodo)}, minus the middle
{difference(adamw[LEAD].lodo, adamw[MIDDLE].lodo)}.

The threshold that suits each family best (largest / smallest: {spreads[LEAD]:.0f} for the lead,
{spreads[COUNTERPART]:.0f}
for its counterpart):

{table(("tau tuned on", *families), constants)}

The value at the best checkpoint of each whole run, median and 10 to 90 %:

{table(("value at the best checkpoint", *families), medians)}

![Where the best checkpoint lies on the lead's scale](images/validity/lead.png)

Within one family the best values spread over as much of the scale as the families do among each other: the threshold
cannot be told from a run by these quantities. It takes a held-out loss, and then no threshold is needed."""


def _both(results: Results) -> dict[int, dict[str, Floats]]:
    """Confirmation and replication set as one: cadence to rule to (runs, horizons)."""
    return {
        count: {name: np.concatenate([own, results.replicated[count][name]]) for name, own in found.items()}
        for count, found in results.confirmed.items()
    }


def _advice(results: Results) -> str:
    both = _both(results)[0]
    path, middle, paper = (both[name] for name in (RECOMMENDED, MIDDLE, PAPER))
    outcome = {
        "better": "It is better than the middle there.",
        "worse": "It is worse than the middle there.",
        "not distinguishable": "That it is better than the middle is not shown there; that it is no worse is likely.",
    }[verdict(path, middle)]
    older = " with a good record on the sets made here"
    if results.external and results.external[TRAINING].mean() > results.external[MIDDLE].mean():
        older += " and a bad one on the older runs"
    return f"""## What follows for the tool

- **Where held-out loss was logged, it decides.** Four samples are enough to be better than every rule here.
- **Without it, `{RECOMMENDED}` is the default**: no constant, no settings, no training log, any number of
  checkpoints, any kind of adapter. On the fresh sets: minus the middle
  {difference(path, middle)}, minus `algorithm1` {difference(path, paper)}. {outcome} It must not be called a
  turning point: it is a share of the way that was trained, moves when the run is made longer, and comes too late where
  training went on far too long.
- **`algorithm1` and `official` reproduce the paper**, and are shown as that. On the fresh sets `algorithm1` at the
  `auto`
  window is {verdict(paper, middle)} {"from" if verdict(paper, middle) == "not distinguishable" else "than"} the middle.
- **No threshold on movement, dose or norm** should be printed as evidence: their constants do not carry over.
- **The training loss at {-results.scores[0][TRAINING].constant:.2f} of its start** is a prior{older}: at most a
  hint, and
  called so.

Definition, for checkpoints 1 .. T with changes D_t over all modules of the run's scope, each with its scale:

- step: `m_t`, the root of the sum over modules of `|D_t - D_(t-1)|^2`; `m_1` that of `|D_1|^2`. In the tool's columns:
  the root of the sum of squares of `step_size`, and at the first checkpoint of `delta_norm`.
- path: `L_t = m_1 + ... + m_t`.
- pick: the first t with `L_t >= L_T / 2`."""


def _confirmation(results: Results) -> str:
    def rows(found: dict[int, dict[str, Floats]]) -> str:
        head = ("rule", "regret", "minus middle", "minus fixed step", "minus random walk", "40 checkpoints", "20", "10")
        lines = [
            (
                name,
                mean_interval(found[0][name]),
                *(difference(found[0][name], found[0][other]) for other in (MIDDLE, FIXED, NULL)),
                *(f"{found[count][name].mean():.3f}" for count in (40, 20, 10)),
            )
            for name in _principal(results)
        ]
        return table(head, lines)

    def places(found: dict[int, dict[str, Floats]]) -> str:
        order = sorted(found[0], key=lambda name: float(found[0][name].mean()))
        asked = (RECOMMENDED, TRAINING, best_with(results), MIDDLE, PAPER, LEAD)
        listed = ", ".join(f"*{name}* {order.index(name) + 1}" for name in dict.fromkeys(asked))
        return (
            f"Places among all {len(order)} rules: {listed}. First: *{order[0]}* with {found[0][order[0]].mean():.3f}."
        )

    names = (RECOMMENDED, TRAINING, MIDDLE, PAPER, "multi-scale", NULL, LEAD, COUNTERPART, FIXED, "last")
    both = _both(results)
    together = [
        (
            name,
            mean_interval(both[0][name]),
            difference(both[0][name], both[0][MIDDLE]),
            verdict(both[0][name], both[0][MIDDLE]) if name != MIDDLE else "",
            difference(both[0][name], both[0][PAPER]),
            *(difference(both[count][name], both[count][MIDDLE]) for count in (40, 20, 10)),
        )
        for name in names
    ]
    columns = ("rule", "regret", "minus middle", "verdict", "minus algorithm1")
    columns += tuple(f"minus middle, {count} checkpoints" for count in (40, 20, 10))
    return f"""## Confirmation: new domains, larger models, trained afterwards

{len(results.confirmation)} runs, two for each of {sum(map(len, CONFIRMATION_DOMAINS.values()))} new domains, models of
about twice the width and more layers, Adagrad as a new optimiser; constants as tuned on all main runs; scored once.

{rows(results.confirmed)}

{places(results.confirmed)}

## Replication: the same domains, other runs

{len(results.confirmation)} runs are too few for narrow intervals: {len(results.replication)} more were drawn in the
same domains (small models, other settings and seeds), after the
confirmation set had been scored. What was asked of them was written down before they were trained.

{rows(results.replicated)}

{places(results.replicated)}

## Both fresh sets together

{len(results.confirmation) + len(results.replication)} runs that no choice was made on.

{table(columns, together)}"""


def _held_out(results: Results) -> str:
    rows = []
    for label, found in results.groups.items():
        runs = {
            "main": results.scores[0],
            "confirmation": results.confirmed[0],
            "replication": results.replicated[0],
        }[label]
        rule = runs[RECOMMENDED]
        path = rule.lodo if isinstance(rule, Score) else rule
        rows.append(
            (
                label,
                mean_interval(found),
                *(f"{value:.3f}" for value in found.mean(axis=0)),
                f"{path.mean():.3f}",
                difference(found, path),
            )
        )
    head = ("set", "regret", "whole run", "half", "quarter", RECOMMENDED, "difference")
    return f"""## Four held-out samples

A reference, not a rule on files: ten groups of four samples that were not trained on, each keeping the checkpoint where
its own loss is lowest, among 40, 20 and 10 checkpoints of a whole run, its half and its quarter. Regret is that of the
whole held-out set (which holds the four). One sample of text is 48 characters.

{table(head, rows)}"""


def _external(results: Results) -> str:
    if not results.external:
        return """## The runs of the earlier study

Not scored: their files are not part of the repository (`--external DIR` scores them)."""
    names = sorted(results.external, key=lambda name: float(results.external[name].mean()))
    shown = names[:6] + [n for n in (*PAPER_RULES, best_valley(results), LEAD, *BASELINES) if n not in names[:6]]
    rows = [
        (name, mean_interval(results.external[name]), difference(results.external[name], results.external[MIDDLE]))
        for name in dict.fromkeys(shown)
        if name in results.external
    ]
    return f"""## The runs of the earlier study

{results.external_runs} older runs (German man pages, Python, change logs, inverted digits; AdamW; all far past
overfitting), of which cosines and losses were kept, not the factors: rules that need the files cannot be scored.
Constants as tuned on the main set. They are not part of the repository.

{table(("rule", "regret", "minus middle"), rows)}"""


def _methods(results: Results) -> str:
    def count(key: str) -> str:
        found = Counter(str(run.setting[key]) for run in results.main)
        return ", ".join(f"{name} {number}" for name, number in sorted(found.items(), key=lambda item: -item[1]))

    steps = [run.setting["steps"] for run in results.main]
    rates = [run.setting["rate"] for run in results.main if run.setting["optimizer"] == "adamw"]
    return f"""## Methods

- **Models**, all taught from scratch by the script: `text` a character Llama on Python's reference documentation;
  `masked` a character ModernBERT on the same; `image` a vision transformer on scikit-learn's digits; `diffusion` a
  convolutional denoiser on digits; `table` a regression network. 5 to 80 thousand parameters; larger in the
  confirmation set.
- **Personal data**: text: {", ".join(MAIN_DOMAINS["text"])}; masked: {", ".join(MAIN_DOMAINS["masked"])}; image:
  {", ".join(MAIN_DOMAINS["image"])}; diffusion: {", ".join(MAIN_DOMAINS["diffusion"])}; table:
  {", ".join(MAIN_DOMAINS["table"])}. Python's own sources, scikit-learn's bundled sets and made-up strings; nothing is
  downloaded. Confirmation: {"; ".join(", ".join(names) for names in CONFIRMATION_DOMAINS.values())}.
- **Runs**: `peft.get_peft_model`, settings drawn with a fixed seed. Optimisers: {count("optimizer")}. Schedules:
  {count("schedule")}. Ranks: {count("rank")}. Samples: {count("samples")}. Batches: {count("batch")}. {min(steps)} to
  {max(steps)} steps; AdamW's learning rate {min(rates):.1g} to {max(rates):.1g}. {SAVES} saves a run; held-out loss
  at each.
- **Columns**: the tool's own code (`lora_forensics.adapters`, `moments`, `metrics`), mean over modules. Beyond it, the
  inner products of all pairs of checkpoints (paths, turns) and of B.
- **Rules**: `benchmarks/validity/candidates.py` lists all {len(CANDIDATES)}. None sees the held-out loss. No pick
  counts
  as the middle checkpoint; a threshold that is not reached as the last.
- **Tuning**: leave one domain out (runs of all horizons of the other domains), leave one family out, text (`text`,
  `masked`) to pictures (`image`, `diffusion`) and back. `tuned` rules have one constant; `taught` ones are boosted
  trees
  on up to 22 curves at once: a test of what the curves can tell together.
- **Random walk**: the rule's median pick on 200 random walks of the same length.
- **Time**: training took {results.seconds / 60:.0f} minutes of one core in all. `--small` trains one run a domain."""


def _limits(results: Results) -> str:
    untouched = np.mean([run.log["held_out"].argmin() >= 0.9 * SAVES for run in results.main])
    return f"""## Limits

- Tiny models. A constant tuned on them says nothing about a 7B model; a rule that needs one is a prior.
- Loss on held-out samples, not the quality of text or pictures.
- The path rule was chosen among {len(CANDIDATES)} on the main set; only the fresh sets speak for it without bias. The
  older runs cannot be scored with it: their factors were not kept. There, all trained far past overfitting, early rules
  such as *multi-scale* are better than the middle.
- Before the candidates were fixed the main set was trained three times, with longer runs and better base models each
  time, and candidates were added after a look at the results: on the main set all of them are optimistic.
- {untouched:.0%} of the main runs have their best checkpoint in the last tenth: training longer was right, and late
  rules
  gain from them. Cutting runs to a half and a quarter adds more such cases. How long a user trains decides how good the
  middle, or any share of the run, is.
- The three horizons of a run are not independent (intervals resample runs), and runs of a domain share data.
- The families differ in number of modules (3 to 15); a large model has hundreds, and a smoother mean CS.
- Numbers change slightly with the versions of Python (its documentation is training data), torch and peft."""


def _all(results: Results) -> str:
    scores = results.scores[0]
    rows = [
        (
            name,
            BY_NAME[name].ideas,
            BY_NAME[name].needs,
            _kind(BY_NAME[name]),
            f"{scores[name].lodo.mean():.3f}",
            f"{scores[name].lofo.mean():.3f}",
            f"{scores[name].to_pictures:.3f}",
            f"{scores[name].to_text:.3f}",
            f"{results.scores[20][name].lodo.mean():.3f}",
            f"{results.confirmed[0][name].mean():.3f}",
            f"{results.replicated[0][name].mean():.3f}",
            f"{results.external[name].mean():.3f}" if name in results.external else "",
        )
        for name in sorted(scores, key=lambda name: float(scores[name].lodo.mean()))
    ]
    head = (
        "rule",
        "idea",
        "needs",
        "constant",
        "other domains",
        "other families",
        "text to pictures",
        "pictures to text",
        "20 checkpoints",
        "confirmation",
        "replication",
        "older runs",
    )
    return f"""## All rules

Mean regret over {len(HORIZONS)} horizons; at every save unless said. `needs`: CS alone, the files, settings, or the
log of
the training loss.

{table(head, rows)}"""
