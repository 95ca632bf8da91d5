"""Summaries that the reports' tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lora_forensics.records import (
    BaseModelSummary,
    Candidate,
    Finding,
    Keep,
    Skipped,
    Status,
    Summary,
    TurningPoint,
    Verdict,
)

HOSTILE = "<script>|\x1b[31m\u202eevil\n# [red]`@team`[/red](http://x.y) www.a.b $x$ #12 *b* \udcff"
"""A name that tries every way out: markup, table cells, terminal codes, text direction, lines, links, mentions."""

MESSAGES: dict[Status, str] = {
    "unhealthy": "every checkpoint holds NaN or only zeros: the training diverged before the first one was saved",
    "no_base_model": "no base model: stabilityai/stable-diffusion-2-1 was looked for beside the run, in its "
    "parents and in the Hugging Face cache",
    "too_few_checkpoints": "6 checkpoints are too few: at least 9 are needed; save more with --save_every_n_steps",
    "no_second_valley": "CS-Fluctuation has no second valley: nothing here says that overfitting has set in",
    "turning_point": "keep checkpoint-260: lowest held-out loss",
}


def _verdict(run: str = "text_peft/output", status: Status = "turning_point") -> Verdict:
    """A full verdict: one that keeps a checkpoint by held-out loss and has a turning point, whatever its status."""
    return Verdict(
        run=run,
        status=status,
        keep=Keep("checkpoint-260/adapter_model.safetensors", 260, 8.6667, "held_out_loss"),
        turning_point=TurningPoint(13, 280, 9.3333, "checkpoint-280/adapter_model.safetensors", 540),
        candidates=(Candidate("checkpoint-280/adapter_model.safetensors", 280, "the turning point"),),
        evidence={
            "held_out": {"step": 260, "checkpoint": "checkpoint-260", "loss": 1.9312345, "last_loss": 2.7134},
            "steps": [20, 1000],
            "valleys": [160, 280, 500],
            "null_band": [180, 420],
            "inside_null_band": True,
        },
        last_is_past_turning_point=True,
        window=5,
        window_reason="one epoch",
        cadence_steps=20.0,
        detector="algorithm1",
        similarity="rowwise",
        components=("model",),
        base_model=BaseModelSummary("base/model.safetensors", 26, 28),
        checkpoints=50,
        findings=(
            Finding("step-zero", "info", "the first checkpoint has no change yet: it has no cosine"),
            Finding(
                "unmatched-modules",
                "warning",
                "2 of 28 modules have no base weight: model.layers.0.self_attn.q_proj, model.layers.0.self_attn.v_proj",
                "give the model that the run was trained on with --base",
            ),
        ),
        trainer="peft",
        adapter="lora",
        path="runs/text_peft/output",
        message=MESSAGES[status],
    )


def _without_keep(status: Status, checkpoints: int) -> Verdict:
    return replace(
        _verdict(f"runs/{status}", status),
        keep=None,
        turning_point=None,
        candidates=(),
        evidence={},
        last_is_past_turning_point=None,
        window=None,
        window_reason="",
        checkpoints=checkpoints,
        findings=(),
    )


@pytest.fixture
def verdict() -> Callable[..., Verdict]:
    """Makes a full verdict for a run's name and a status."""
    return _verdict


@pytest.fixture
def without_keep() -> Callable[[Status, int], Verdict]:
    """Makes a verdict without an answer for a status and a number of checkpoints."""
    return _without_keep


@pytest.fixture
def sample() -> Summary:
    """One run of each status, a run whose answer rests on the turning point, and skipped files."""
    by_turning_point = replace(
        _verdict("style/my_style-v2"),
        keep=Keep("my_style-v2-step00000280.safetensors", 280, None, "turning_point"),
        evidence={"steps": [20, 500]},
        last_is_past_turning_point=False,
        window_reason="100 steps: the epoch is not known",
        findings=(Finding("no-epoch", "error", "two files claim step 400", "remove one of them"),),
        skipped=(
            Skipped(Path("style/my_style-v2-000004.safetensors"), "truncated: 12 bytes missing"),
            Skipped(Path("style/my_style-v2-000005.safetensors"), "truncated: 12 bytes missing"),
            Skipped(Path("style/my_style-v2-000006.safetensors"), "empty file"),
            Skipped(Path("style/state"), "training state", expected=True),
        ),
    )
    counted = {"no_second_valley": 30, "too_few_checkpoints": 6, "no_base_model": 40, "unhealthy": 12}
    return Summary(
        runs=(_verdict(), by_turning_point, *(_without_keep(status, n) for status, n in counted.items())),
        skipped=(Skipped(Path("notes/readme.safetensors"), "no safetensors header"),),
        versions={"lora_forensics": "0.1.0"},
        folder=Path("forensics"),
    )


@pytest.fixture
def hostile() -> Summary:
    """Every text that comes from files is hostile."""
    bad = HOSTILE
    return Summary(
        runs=(
            replace(
                _verdict(bad),
                keep=Keep(bad, 260, float("nan"), "held_out_loss"),
                candidates=(Candidate(bad, 1, bad),),
                evidence={"held_out": {"loss": float("nan"), "last_loss": bad}, "steps": "?", "null_band": None},
                window_reason=bad,
                base_model=BaseModelSummary(bad, 1, 2),
                findings=(Finding(bad, "warning", bad, bad),),
                skipped=(Skipped(Path(bad), bad),),
                trainer=bad,
                adapter=bad,
                message=bad,
            ),
        ),
        skipped=(Skipped(Path(bad), bad),),
        folder=Path(bad),
    )
