"""What is made of scores: differences, the flat set, findings, and the file they are kept in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lora_forensics.probed import (
    FILE,
    Answer,
    Asked,
    Probed,
    Score,
    answer_of,
    difference,
    load_probed,
    save_probed,
)

STEPS = {f"c{number}": 10 * number for number in range(1, 9)}
PRINTS: dict[str, str | None] = {name: f"print of {name}" for name in STEPS}


def probed(scores: Mapping[str, Sequence[float]], maximise: bool = False) -> Probed:
    """A probe that came to its end, with these numbers."""
    found = tuple(
        Score(name, f"print of {name}", "me", float(np.mean(row)), tuple(row) if len(row) > 1 else ())
        for name, row in scores.items()
    )
    return Probed(found, Asked("me", "my scorer", maximise, {name: str(PRINTS[name]) for name in STEPS}))


def answer(scores: Mapping[str, Sequence[float]], maximise: bool = False) -> Answer:
    """What these numbers say."""
    found = answer_of(probed(scores, maximise), STEPS, PRINTS)
    assert found is not None
    return found


def rules(found: Answer) -> set[str]:
    """Ids of the findings."""
    return {finding.rule for finding in found.findings}


def test_a_difference_is_a_paired_t_interval() -> None:
    """As scipy has it; pairing takes out what all checkpoints have in common."""
    random = np.random.default_rng(0)
    common = random.normal(0, 100, 8)
    worse, best = common + random.normal(0.5, 0.1, 8), common
    found = difference(worse, best)
    interval = stats.ttest_rel(worse, best).confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(worse - best))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert not found.noise


def test_the_lowest_is_kept_and_what_is_as_good_is_a_set() -> None:
    """c2 and c3 differ by less than their samples scatter; c6 is worse throughout."""
    found = answer({"c2": [1.0, 2.1, 3.0], "c3": [1.1, 1.9, 3.05], "c6": [2.0, 3.0, 4.05]})
    assert (found.checkpoint, found.step) == ("c3", 30) or found.checkpoint == "c2"
    assert [entry["checkpoint"] for entry in found.evidence["flat"]] == ["c2", "c3"]
    assert "probe-flat" in rules(found)
    assert "any of steps 20, 30" in next(f.message for f in found.findings if f.rule == "probe-flat")


def test_equal_scores_keep_the_earliest() -> None:
    """A flat optimum is a set, and the earliest stands for it."""
    found = answer({"c5": [1.0, 2.0], "c3": [1.0, 2.0], "c4": [1.0, 2.0]})
    assert found.checkpoint == "c3"
    assert [entry["step"] for entry in found.evidence["flat"]] == [30, 40, 50]


def test_higher_is_better_where_it_was_said_so() -> None:
    """Scores stay as they were printed; differences count what is lost."""
    found = answer({"c2": [0.5], "c3": [0.9], "c5": [0.7]}, maximise=True)
    assert found.checkpoint == "c3"
    assert found.evidence["score"] == 0.9
    assert found.evidence["runner_up"]["checkpoint"] == "c5"
    assert found.evidence["runner_up"]["worse_by"] == pytest.approx(0.2)


def test_one_number_has_no_noise_that_is_known() -> None:
    """No interval, no set, and a finding that says so."""
    found = answer({"c2": [0.5], "c3": [0.4], "c5": [0.7]})
    assert [entry["interval"] for entry in found.evidence["evaluations"]] == [None] * 3
    assert len(found.evidence["flat"]) == 1
    (finding,) = found.findings
    assert "not known" in finding.message


def test_a_best_at_the_edge_is_no_bracket() -> None:
    """Unless the edge is that of the run."""
    assert "probe-open" in rules(answer({"c3": [1.0], "c5": [2.0]}))
    assert "probe-open" not in rules(answer({"c1": [1.0], "c5": [2.0]}))
    assert answer({"c3": [2.0], "c4": [1.0], "c6": [3.0]}).evidence["bracket"] == [30, 60]


def test_a_file_that_changed_has_no_score_any_more() -> None:
    """Its score belongs to what it was; without any score there is no answer."""
    stored = probed({"c2": [1.0], "c3": [2.0]})
    changed = {**PRINTS, "c2": "another"}
    found = answer_of(stored, STEPS, changed)
    assert found is not None
    assert found.checkpoint == "c3"
    assert answer_of(stored, STEPS, dict.fromkeys(STEPS, "another")) is None
    assert answer_of(stored, {"c7": 70}, PRINTS) is None


def test_checkpoints_that_came_later_make_it_stale() -> None:
    """It is kept, and said so."""
    steps = {**STEPS, "c9": 90}
    found = answer_of(probed({"c2": [1.0], "c3": [2.0], "c1": [3.0]}), steps, {**PRINTS, "c9": "new"})
    assert found is not None
    assert found.checkpoint == "c2"
    assert "probe-stale" in rules(found)
    assert found.evidence["later"] == ["c9"]


def test_the_file_keeps_all_of_it(tmp_path: Path) -> None:
    """Written and read: the same; a damaged or newer file is none."""
    stored = probed({"c2": [1.0, 2.0], "c3": [2.0, 3.0]})
    save_probed(tmp_path, stored)
    assert load_probed(tmp_path) == stored
    text = (tmp_path / FILE).read_text("utf-8")
    for damaged in (text[:50], text.replace('"schema": 1', '"schema": 99'), "[]", "{}", '{"schema": 1, "scores": [1]}'):
        (tmp_path / FILE).write_text(damaged, "utf-8")
        assert load_probed(tmp_path) == Probed()


def test_scores_of_another_scorer_are_not_mixed_in() -> None:
    """A score takes the place of the one before by the same scorer, and of no other."""
    stored = probed({"c2": [1.0]}).with_score(Score("c2", "print of c2", "other", 9.0))
    assert len(stored.scores) == 2
    assert (
        stored.with_score(Score("c2", "print of c2", "me", 5.0)).known("me", {"c2": "print of c2"})["c2"].value == 5.0
    )
