"""docs/validity.md from the numbers: every figure on the page is computed here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
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
GUESSES = ("middle", "a quarter", "last", "random (expected)")
"""Baselines that look at nothing."""


def write(results: Results, path: Path, unchanged: bool, small: bool) -> None:
    """Write the page."""
    parts = [
        _head(results, unchanged, small),
        _short_answer(results),
        _main_table(results),
        _cadences(results),
        _lead(results),
        _confirmation(results),
        _external(results),
        _methods(results),
        _limits(results),
        _all(results),
    ]
    path.write_text("\n\n".join(part.strip() for part in parts if part.strip()) + "\n", "utf-8")


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
    """The best rule without a constant that looks for valleys of CS-Fluctuation against steps."""
    names = [
        c.name for c in CANDIDATES if not c.tuned and c.ideas in ("paper", "windows", "prominence", "joint evidence")
    ]
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
        "The candidates and the scoring were fixed before the confirmation set was trained "
        "(`benchmarks/validity/PREREGISTERED.txt`), and are unchanged since."
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
rules, and
{len(results.confirmation)} runs of new domains and larger models that were trained afterwards. {note}{size}

**Regret** is the measure: (held-out loss at the pick - lowest) / (highest - lowest), 0 for the best checkpoint and 1
for
the worst, the untrained model included. Each run counts at three lengths: whole, first half, first quarter. Brackets
are 95 % intervals from resampling runs."""


def _short_answer(results: Results) -> str:
    without, tuned, valley = best_without(results), best_with(results), best_valley(results)
    scores = results.scores[0]
    middle, fixed, null, paper = (_lodo(results, name) for name in (MIDDLE, FIXED, NULL, PAPER))
    lowest = min((c.name for c in CANDIDATES), key=lambda name: scores[name].lodo.mean())
    reached = [
        c.name
        for c in CANDIDATES
        if scores[c.name].lodo.mean() <= GOAL and verdict(scores[c.name].lodo, fixed) == "better"
    ]
    confirmed = results.confirmed[0]
    goal = (
        f"Reached by {', '.join(reached)}."
        if reached
        else f"**Nothing reaches it.** The lowest of {len(CANDIDATES)} is *{lowest}*: {scores[lowest].lodo.mean():.3f}."
    )
    tens = results.scores[10]
    lines = [
        f"1. **The goal was a regret of {GOAL} on domains that a rule was not tuned on.** {goal}",
        f"2. **The paper's second valley, at the tool's `auto` window, is no better than the middle checkpoint**: "
        f"{mean_interval(paper)} against {mean_interval(middle)}, difference {difference(paper, middle)} "
        f"({verdict(paper, middle)}). Where a random walk of the same length would put it: "
        f"{null.mean():.3f}, difference "
        f"{difference(paper, null)} ({verdict(paper, null)}). Confirmation set: {confirmed[PAPER].mean():.3f}, "
        f"middle {confirmed[MIDDLE].mean():.3f}."
        if verdict(paper, middle) != "better"
        else f"2. The paper's second valley, `auto` window: {mean_interval(paper)}, middle {mean_interval(middle)}.",
        f"3. **Best record without a tuned constant: *{without}*.** Regret {mean_interval(_lodo(results, without))}; "
        f"against the middle {difference(_lodo(results, without), middle)}, against the tuned fixed step "
        f"{difference(_lodo(results, without), fixed)}, against the random-walk constant "
        f"{difference(_lodo(results, without), null)}. With 10 checkpoints {tens[without].lodo.mean():.3f} "
        f"(middle {tens[MIDDLE].lodo.mean():.3f}). Confirmation set: {mean_interval(confirmed[without])}, against the "
        f"middle {difference(confirmed[without], confirmed[MIDDLE])} "
        f"({verdict(confirmed[without], confirmed[MIDDLE])}). {_meaning(without)}",
        f"4. **Best record with a constant (a *prior*): *{tuned}*.** Regret {mean_interval(_lodo(results, tuned))}; "
        f"confirmation set {mean_interval(confirmed[tuned])}, against the middle "
        f"{difference(confirmed[tuned], confirmed[MIDDLE])}.",
        f"5. **Best of the rules that look for valleys: *{valley}***, "
        f"{mean_interval(_lodo(results, valley))}; against the "
        f"middle {difference(_lodo(results, valley), middle)} ({verdict(_lodo(results, valley), middle)}).",
        f"6. **The lead `{LEAD}` is {_lead_verdict(results)}.** Regret "
        f"{mean_interval(_lodo(results, LEAD))}, against the "
        f"tuned fixed step {difference(_lodo(results, LEAD), fixed)}, against the middle "
        f"{difference(_lodo(results, LEAD), middle)}. Its weights-only counterpart, the movement of B per "
        f"output row and "
        f"sample: {mean_interval(_lodo(results, COUNTERPART))}. Neither threshold carries over between "
        f"families: see below.",
        f"7. The training loss: the tuned share of its fall {_lodo(results, SHARE).mean():.3f} "
        f"(confirmation {confirmed[SHARE].mean():.3f}), its knee "
        f"{_lodo(results, 'knee of the training loss').mean():.3f}, "
        f"its lowest point {_lodo(results, 'lowest training loss').mean():.3f}.",
    ]
    return "## Short answer\n\n" + "\n".join(lines) + "\n\n" + _pictures()


SHARE = "share of the training loss's fall"


def _meaning(name: str) -> str:
    meanings = {
        "half of the path": "The path is the sum of the distances between neighbouring checkpoints, over all modules "
        "together; the rule keeps the first checkpoint at which half of it is covered. It knows nothing about "
        "overfitting: it is a middle that counts movement instead of steps.",
        "step size halves": "It keeps the first checkpoint, after the longest movement, at which movements between "
        "checkpoints are half as long.",
    }
    return meanings.get(name, "")


def _pictures() -> str:
    return """![Regret of the main rules with intervals](images/validity/rules.png)

![Regret by number of checkpoints](images/validity/checkpoints.png)"""


def _principal(results: Results) -> list[str]:
    """Rules of the main tables: what the page speaks of, the next best, the paper's, baselines."""
    chosen = [best_without(results), best_with(results)]
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
            )
        )
    head = (
        "rule",
        "constant",
        "regret, other domains",
        "minus fixed step",
        "minus middle",
        "minus random walk",
        "overfitted only",
    )
    return f"""## Regret at every save ({SAVES}, {SAVES // 2} and {SAVES // 4} checkpoints)

Constants are tuned on the other {sum(map(len, MAIN_DOMAINS.values())) - 1} domains. "Overfitted only" are the
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
    return f"""## By number of checkpoints

Users have few checkpoints. Here each horizon is thinned to that many even ones, and regret counts within these.

{table(head, rows)}

`algorithm1` with the tool's `auto` window against the middle checkpoint (no pick counts as the middle):

{counts}"""


def _lead_verdict(results: Results) -> str:
    lead, fixed = _lodo(results, LEAD), _lodo(results, FIXED)
    fresh = results.confirmed[0]
    good = lead.mean() <= GOAL and verdict(lead, fixed) == "better"
    ahead = verdict(lead, fixed) == "better" and verdict(fresh[LEAD], fresh[FIXED]) == "better"
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
the same from the files is the root mean square length of B's rows, per sample. Here both meet fresh families, seven
optimisers' worth of step sizes, 8 to 80 samples and batches of 1 to 30.

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

The spread within one family is as wide as the whole scale, so a threshold cannot be told from the run by these
quantities. It needs a held-out loss, and then no threshold is needed."""


def _confirmation(results: Results) -> str:
    rows = []
    for name in _principal(results):
        own = results.confirmed[0][name]
        rows.append(
            (
                name,
                mean_interval(own),
                difference(own, results.confirmed[0][MIDDLE]),
                difference(own, results.confirmed[0][FIXED]),
                *(f"{results.confirmed[count][name].mean():.3f}" for count in (40, 20, 10)),
            )
        )
    order = sorted(results.confirmed[0], key=lambda name: float(results.confirmed[0][name].mean()))
    places = {name: order.index(name) + 1 for name in (best_without(results), best_with(results), MIDDLE, PAPER)}
    return f"""## Confirmation: new domains, larger models, trained afterwards

{len(results.confirmation)} runs, two for each of {sum(map(len, CONFIRMATION_DOMAINS.values()))} new domains, models
of twice the
width and more layers, Adagrad as a new optimiser; constants as tuned on all main runs; scored once.

{table(("rule", "regret", "minus middle", "minus fixed step", "40 checkpoints", "20", "10"), rows)}

Places among all {len(order)} rules here: {", ".join(f"*{name}* {place}" for name, place in places.items())}. First
here:
*{order[0]}* with {results.confirmed[0][order[0]].mean():.3f}, {_lodo(results, order[0]).mean():.3f} on the main set."""


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
        "older runs",
    )
    return f"""## All rules

Mean regret over {len(HORIZONS)} horizons; at every save unless said. `needs`: CS alone, the files, settings, or the
log of
the training loss.

{table(head, rows)}"""
