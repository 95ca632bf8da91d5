"""Every rule of the table is found on a run made to show it, and not on healthy ones."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from cli_runs import MODULES, base_model, checkpoint, project
from click.testing import CliRunner
from factories import kohya_base, kohya_file, kohya_metadata, kohya_run
from image_layouts import STEPS, ai_toolkit
from make_damaged import kohya_tensors, write_kohya
from safetensors.torch import load_file, save_file
from tables import layers_of, wavy

from lora_forensics.assess import assess
from lora_forensics.cli import main
from lora_forensics.failures import FAILURES
from lora_forensics.inspection.looking import inspect_file
from lora_forensics.measure import MeasureOptions
from lora_forensics.probe import ProbeOptions
from lora_forensics.probe.probing import probe_run
from lora_forensics.records import Finding
from lora_forensics.rules import RULES, Thresholds, anchor, matching
from lora_forensics.scan import ScanOptions, load_summary, scan
from lora_forensics.similarity import AssessOptions

DATA = Path(__file__).parent / "data" / "damaged"
SAMPLES = Path(__file__).parent.parent / "sample_runs"
WEIGHTS = "adapter_model.safetensors"

Case = Callable[[Path], list[Finding]]
CASES: dict[str, Case] = {}
"""Rule to what shows it: a function from an empty folder to findings."""


def shows(*rules: str) -> Callable[[Case], Case]:
    """Marks a function as the case of these rules."""

    def mark(case: Case) -> Case:
        CASES.update(dict.fromkeys(rules, case))
        return case

    return mark


def scanned(path: Path, **settings: Any) -> list[Finding]:
    """All findings of a scan, those of no run included."""
    done = scan([path], ScanOptions(out=path.parent / "out", plots=False, **settings)).summary
    return [*done.findings, *(finding for verdict in done.runs for finding in verdict.findings)]


def of_tables(layers: pl.DataFrame, places: pl.DataFrame | None = None, **others: Any) -> list[Finding]:
    """The findings of synthetic tables."""
    return list(assess(layers, places, **others).verdict.findings)


def rewrite(file: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Change the tensors of a checkpoint."""
    save_file({name: change(name, tensor).clone() for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def run_of(folder: Path, count: int = 12, **settings: Any) -> Path:
    """A healthy run with its base."""
    return project(folder / "runs", count=count, **settings)


def saved(runs: Path, step: int) -> Path:
    """The weights of one step."""
    return runs / "run" / f"checkpoint-{step}" / WEIGHTS


UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TE = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
SIDES = 16


def aligned_base(folder: Path) -> Path:
    """A UNet and a text encoder of one weight each: the first of the unit matrices."""
    weight = torch.zeros(SIDES, SIDES)
    weight[0, 0] = 1.0
    unet = {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": weight}
    save_file(unet, _made(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    encoder = {"text_model.encoder.layers.0.self_attn.q_proj.weight": weight.clone()}
    save_file(encoder, _made(folder / "text_encoder" / "model.safetensors"))
    (folder / "model_index.json").write_text("{}")
    return folder


def aligned(cosine: float) -> dict[str, torch.Tensor]:
    """Factors whose product has this cosine to that weight."""
    up, down = torch.zeros(SIDES, 1), torch.zeros(1, SIDES)
    down[0, 0], up[0, 0], up[1, 0] = 1.0, cosine, math.sqrt(1 - cosine**2)
    return {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(1.0)}


@shows("truncated-file", "empty-file", "unreadable-file", "unfinished-save")
def damaged_files(folder: Path) -> list[Finding]:
    """One file cut, one empty, one a web page, one missing."""
    runs = run_of(folder)
    data = saved(runs, 20).read_bytes()
    saved(runs, 20).write_bytes(data[:-100])
    saved(runs, 40).write_bytes(b"")
    saved(runs, 60).write_bytes(b"<!DOCTYPE html> please sign in to download")
    saved(runs, 80).unlink()
    return scanned(runs)


@shows("foreign-file", "empty-tensors")
def foreign_and_empty(folder: Path) -> list[Finding]:
    """An embedding in the place of an adapter; tensors of shape [0]."""
    runs = run_of(folder)
    save_file({"emb_params": torch.randn(4, 8)}, saved(runs, 20))
    rewrite(saved(runs, 40), lambda _name, _tensor: torch.empty(0))
    return scanned(runs)


@shows("unsafe-pickle")
def pickle_with_code(folder: Path) -> list[Finding]:
    """Refused, and nothing of it is run."""
    runs = run_of(folder)
    shutil.rmtree(saved(runs, 20).parent)
    shutil.copytree(DATA / "malicious_pickle" / "checkpoint-10", saved(runs, 20).parent)
    found = scanned(runs)
    assert not list(folder.rglob("PWNED"))
    return found


@shows("unplaced-adapter")
def unplaced(folder: Path) -> list[Finding]:
    """An adapter whose name says nothing, beside a run."""
    runs = run_of(folder)
    (runs / "other").mkdir()
    shutil.copy(saved(runs, 20), runs / "other" / "mine.safetensors")
    return scanned(runs)


@shows("nonfinite", "outlier-modules", "dead-modules", "larger-than-weight")
def sick_modules(folder: Path) -> list[Finding]:
    """A NaN at one step; at the end one module is dead, another exploded."""
    torch.manual_seed(0)
    runs = folder / "runs"
    names = [f"model.layers.{n}.self_attn.q_proj" for n in range(6)]
    save_file({f"{name}.weight": torch.randn(8, 8) for name in names}, _made(runs / "base.safetensors"))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "../base.safetensors"}
    for step in range(10, 50, 10):
        tensors = {f"base_model.model.{name}.lora_A.weight": torch.randn(2, 8) for name in names}
        tensors |= {f"base_model.model.{name}.lora_B.weight": 0.01 * torch.randn(8, 2) for name in names}
        tensors[f"base_model.model.{names[0]}.lora_B.weight"] *= 0
        tensors[f"base_model.model.{names[1]}.lora_B.weight"] *= 1e4
        if step == 20:
            tensors[f"base_model.model.{names[2]}.lora_B.weight"][0, 0] = torch.nan
        save_file(tensors, _made(saved(runs, step)))
        (saved(runs, step).parent / "adapter_config.json").write_text(json.dumps(config))
    return scanned(runs)


@shows("zero-change", "checkpoint-undefined")
def untrained(folder: Path) -> list[Finding]:
    """B is zero at two checkpoints."""
    runs = run_of(folder)
    for step in (30, 40):
        rewrite(saved(runs, step), lambda name, tensor: tensor * ("lora_B" not in name))
    return scanned(runs)


@shows("flushed-to-zero", "dtype-changes")
def underflow(folder: Path) -> list[Finding]:
    """The second half is saved in float16, small numbers of it as 0."""
    runs = run_of(folder)
    for step in range(70, 130, 10):
        rewrite(saved(runs, step), lambda _, tensor: (tensor * (tensor.abs() > 0.3)).half())
    return scanned(runs)


@shows("duplicate", "unchanged")
def copies(folder: Path) -> list[Finding]:
    """The same state at two steps, and as the final file."""
    runs = run_of(folder)
    shutil.copy(saved(runs, 40), saved(runs, 50))
    shutil.copy(saved(runs, 120), runs / "run" / WEIGHTS)
    shutil.copy(saved(runs, 120).parent / "adapter_config.json", runs / "run")
    return scanned(runs)


@shows("step-unknown", "log-unreadable")
def stepless(folder: Path) -> list[Finding]:
    """A final adapter that equals none; a log that is none."""
    runs = run_of(folder)
    checkpoint(runs / "run", 500, "../base.safetensors")
    (runs / "run" / "trainer_log.jsonl").write_text('{"current_steps": 10, "loss": 1.0}\n\0\n[1]\n')
    for state in runs.rglob("trainer_state.json"):
        state.unlink()
    return scanned(runs)


@shows("superseded")
def resumed_from_an_epoch(folder: Path) -> list[Finding]:
    """Kohya's second session restarts its steps: what the first saved after the epoch is of another path."""
    runs = folder / "runs"
    runs.mkdir()
    for step in (10, 20, 30, 40, 50):
        kohya_file(runs / f"a-step{step:08d}.safetensors", step, kohya_metadata(step, (step - 1) // 20, "a", "1"))
    for epoch in (1, 2):
        kohya_file(runs / f"a-{epoch:06d}.safetensors", epoch * 20, kohya_metadata(epoch * 20, epoch, "a", "1"))
    for step in (10, 20, 30):
        metadata = kohya_metadata(step, 2 + (step - 1) // 20, "a", "2")
        kohya_file(runs / f"a-step{step:08d}.safetensors", step + 40, metadata)
    return scanned(runs)


@shows("same-step", "resumed", "final-overwritten", "epochs-only")
def kohya_sessions(folder: Path) -> list[Finding]:
    """Files of kohya: two of one step, a resumed session, a final file of another training, names without metadata."""
    found: list[Finding] = []
    for name, files in {
        "same": [("s-000001", "1", 10), ("s-000002", "1", 20), ("s", "1", 20)],
        "resumed": [
            *((f"s-step{n:08d}", "1", n) for n in (10, 20, 30, 40)),
            *((f"s-step{n:08d}", "2", n) for n in (50, 60)),
        ],
        "final": [*((f"s-step{n:08d}", "1", n) for n in (10, 20, 30)), ("s", "2", 10)],
        "bare": [("s-000001", "", 0), ("s-000002", "", 0)],
    }.items():
        for place, (stem, session, step) in enumerate(files):
            tensors = {key: tensor + place for key, tensor in kohya_tensors().items()}
            meta = {"ss_session_id": session, "ss_output_name": "s", "ss_steps": str(step)} if session else {}
            save_file(tensors, _made(folder / "runs" / name / f"{stem}.safetensors"), meta)
        found += scanned(folder / "runs" / name)
    return found


@shows("missing-steps", "keep-limit", "out-of-order")
def lost_steps(folder: Path) -> list[Finding]:
    """The first three and one in the middle are gone; the last four are an hour older than the others."""
    runs = run_of(folder)
    for step in (10, 20, 30, 70):
        shutil.rmtree(saved(runs, step).parent)
    for place, step in enumerate((40, 50, 60, 80, 90, 100, 110, 120)):
        os.utime(saved(runs, step), (0, 1_700_000_000 + 10 * place - 7200 * (place > 3)))
    return scanned(runs)


@shows("mixed-runs", "scale-changes")
def two_trainings(folder: Path) -> list[Finding]:
    """Alpha changes at one step; a module is missing at another."""
    runs = run_of(folder)
    config = saved(runs, 50).parent / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    kept = {name: tensor.clone() for name, tensor in load_file(saved(runs, 90)).items() if MODULES[0] not in name}
    save_file(kept, saved(runs, 90))
    return scanned(runs)


@shows("scale-unknown", "svd-initialised", "module-unread", "full-weights")
def odd_adapters(folder: Path) -> list[Finding]:
    """No configuration; CorDA; a kind that nobody knows; a bias."""
    runs = run_of(folder)
    (saved(runs, 120).parent / "adapter_config.json").unlink()
    for step in range(10, 120, 10):
        config = saved(runs, step).parent / "adapter_config.json"
        config.write_text(config.read_text().replace('"r"', '"init_lora_weights": "corda", "r"'))
        more = {"base_model.model.y.bias": torch.ones(8)}
        save_file({name: t.clone() for name, t in {**load_file(saved(runs, step)), **more}.items()}, saved(runs, step))
    write_kohya(folder / "odd", {**kohya_tensors(), "lora_unet_x.lora_down.weight": torch.ones(2, 4)}, 10)
    return [*scanned(runs), *scanned(folder / "odd")]


@shows("no-base-model", "without-base", "learning-rate-unknown")
def no_base(folder: Path) -> list[Finding]:
    """The base is gone; and a run with cosines and without the trainer's states."""
    runs = run_of(folder)
    (runs / "base.safetensors").unlink()
    mute = run_of(folder / "mute", count=20)
    for state in mute.rglob("trainer_state.json"):
        state.unlink()
    return [*scanned(runs), *scanned(mute)]


@shows("base-mismatch")
def wrong_base(folder: Path) -> list[Finding]:
    """The same names in another width."""
    runs = run_of(folder)
    base_model(runs / "base.safetensors", width=16)
    return scanned(runs)


@shows("module-unresolved", "base-nonfinite")
def holes_in_the_base(folder: Path) -> list[Finding]:
    """One weight is missing, another holds a NaN."""
    runs = run_of(folder)
    weights = load_file(runs / "base.safetensors")
    weights[f"{MODULES[0]}.weight"][0, 0] = torch.nan
    del weights[f"{MODULES[1]}.weight"]
    save_file(weights, runs / "base.safetensors")
    return scanned(runs)


@shows("base-hash-differs", "base-missing")
def another_base(folder: Path) -> list[Finding]:
    """The file is not the one that kohya recorded; between two scans it goes away, and a checkpoint comes."""
    base = kohya_base(folder / "base")
    single = folder / "single.safetensors"
    save_file(load_file(base / "unet" / "diffusion_pytorch_model.safetensors"), single)
    run = kohya_run(folder / "runs", steps=[10, 20, 30], ss_new_sd_model_hash="0" * 64)
    found = scanned(run, base=(single,))
    single.unlink()
    kohya_run(folder / "more", steps=[10, 20, 30, 40, 50], ss_new_sd_model_hash="0" * 64)
    for file in (folder / "more").glob("*0040.safetensors"):
        shutil.copy(file, run)
    return [*found, *scanned(run)]


@shows("several-trainings", "held-out-elsewhere")
def histories(folder: Path) -> list[Finding]:
    """A rerun with other losses has overwritten the first half; the best evaluation was not saved."""
    runs = run_of(folder)
    for step in range(10, 130, 10):
        second = step <= 60
        log = [{"step": s, "loss": 1.0 + second + s / 1000, "learning_rate": 1e-4} for s in range(10, step + 1, 10)]
        log += [{"step": s, "eval_loss": abs(s - 25) / 10 + second} for s in range(5, step + 1, 5)]
        state = {"global_step": step, "log_history": log}
        (saved(runs, step).parent / "trainer_state.json").write_text(json.dumps(state))
    return scanned(runs)


@shows("pruned")
def pruned_by_the_trainer(folder: Path) -> list[Finding]:
    """ai-toolkit's settings say that it deletes."""
    run = ai_toolkit(folder / "runs", keep=3) or folder / "runs"
    for step in STEPS[:3]:
        (folder / "runs" / f"name_{step:09d}.safetensors").unlink()
    assert run
    return scanned(folder / "runs")


@shows("reset", "settled")
def stopped_and_begun_anew(folder: Path) -> list[Finding]:
    """B falls to a twentieth from the seventh on; and B that hardly grows any more from the fifth on."""
    anew, still = run_of(folder / "anew"), run_of(folder / "still")
    for step in range(70, 130, 10):
        rewrite(saved(anew, step), lambda name, tensor: tensor * (0.05 if "lora_B" in name else 1))
    for step in range(50, 130, 10):
        shutil.copy(saved(still, 40), saved(still, step))
        growth = 1 + step / 1e5
        rewrite(saved(still, step), lambda name, tensor, by=growth: tensor * (by if "lora_B" in name else 1))
    return [*scanned(anew), *scanned(still)]


@shows("intruder-dimensions", "text-encoder-first", "follows-schedule", "weak-evidence")
def papers(folder: Path) -> list[Finding]:
    """A turning point in the warm-up, a text encoder that turns before it; and changes larger than their weights."""
    base = aligned_base(folder / "base")
    steps = range(10, 610, 10)
    warm = {"ss_lr_scheduler": "constant_with_warmup", "ss_lr_warmup_steps": "900"}
    for step, slow, fast in zip(steps, wavy(60, 30.0), wavy(60), strict=True):
        tensors = {f"{TE}.{part}": tensor for part, tensor in aligned(fast).items()}
        tensors |= {f"{UNET}.{part}": tensor for part, tensor in aligned(slow).items()}
        path = _made(folder / "runs" / f"name-step{step:08d}.safetensors")
        save_file(tensors, path, kohya_metadata(step, step // 20, **warm))
    chosen = AssessOptions(window="2", detector="algorithm1")
    large = run_of(folder / "large")
    return [
        *scanned(folder / "runs", base=(base,), assess=chosen),
        *scanned(large, measure=MeasureOptions(analyses=("intruders",))),
    ]


@shows("uneven-cadence", "too-few-checkpoints", "few-checkpoints")
def few_and_uneven(folder: Path) -> list[Finding]:
    """Twelve at growing intervals; six."""
    uneven = folder / "uneven"
    base_model(uneven / "base.safetensors")
    for n in range(1, 13):
        checkpoint(uneven / "run" / f"checkpoint-{10 * n + n * n}", 10 * n, "../base.safetensors")
    return [*scanned(uneven), *scanned(run_of(folder / "six", count=6))]


@shows("probe-flat", "probe-open", "probe-stale")
def probed_badly(folder: Path) -> list[Finding]:
    """The last is the best, by one number each; another was saved later."""
    runs = run_of(folder)
    later = saved(runs, 120).parent.rename(folder / "later")
    script = folder / "score.py"
    script.write_text("import re, sys; print(-int(re.search('checkpoint-([0-9]+)', sys.argv[1])[1]))")
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(script))} {{checkpoint}}"
    told = ScanOptions(out=folder / "out", plots=False)
    first = probe_run(runs, told, ProbeOptions(score=command, evaluations=4)).summary
    later.rename(runs / "run" / "checkpoint-120")
    return [*(finding for verdict in first.runs for finding in verdict.findings), *scanned(runs)]


@shows("last-is-past")
def too_long(folder: Path) -> list[Finding]:
    """Held-out loss rises from the fifth checkpoint on."""
    return scanned(run_of(folder, losses=[abs(place - 4) + 1.0 for place in range(12)]))


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def call(*arguments: str | Path) -> Any:
    """Run a command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_shown_by_a_run_made_for_it(rule: str, tmp_path: Path) -> None:
    """With a severity that its documentation names, and a message."""
    found = [finding for finding in CASES[rule](tmp_path) if finding.rule == rule]
    assert found
    for finding in found:
        assert finding.severity in (RULES[rule].severity, *RULES[rule].softer)
        assert finding.message


def test_healthy_runs_show_what_they_rightly_have_and_no_more(tmp_path: Path) -> None:
    """A run without a fault; and the sample runs."""
    runs = run_of(tmp_path)
    for step in range(10, 130, 10):
        rewrite(saved(runs, step), lambda name, tensor: tensor * (0.01 if "lora_B" in name else 1))
    assert {finding.rule for finding in scanned(runs)} <= {"weak-evidence", "last-is-past"}
    rightly = {"duplicate", "weak-evidence", "last-is-past", "text-encoder-first"}
    samples = tmp_path / "samples"
    samples.mkdir()
    (samples / "sample_runs").symlink_to(SAMPLES, target_is_directory=True)
    assert {finding.rule for finding in scanned(samples / "sample_runs")} <= rightly


def test_every_finding_of_the_code_is_of_a_rule() -> None:
    """No module makes a finding whose id is not in the table, and every failure in the list names real rules."""
    package = Path(__file__).parent.parent / "lora_forensics"
    ids = {
        found
        for file in package.rglob("*.py")
        for found in re.findall(r'Finding\(\s*"([\w-]+)"|rule="([\w-]+)"', file.read_text("utf-8"))
        for found in found
        if found
    }
    assert ids <= set(RULES)
    assert {rule for failure in FAILURES for rule in failure.rules} <= set(RULES)


def test_a_damaged_file_is_told_once_in_the_terminal_and_fails_when_named(tmp_path: Path) -> None:
    """The list of skipped files tells it; `--fail-on` takes its rule; `--ignore` takes it away, and says so."""
    runs = run_of(tmp_path)
    saved(runs, 20).write_bytes(b"")
    out = tmp_path / "out"
    common = ("scan", runs, "--out", out, "--no-plots", "--no-config")
    done = call(*common, "--fail-on", "empty-file")
    assert done.exit_code == 1
    assert "empty-file (error)" in done.stderr
    assert done.stdout.count("not a safetensors file") == 1
    assert call(*common, "--strict").exit_code == 2
    ignored = call(*common, "--fail-on", "error", "--strict", "--ignore", "empty", "--ignore", "info")
    assert ignored.exit_code == 0
    assert re.search(r"[1-9] findings? ignored", ignored.stdout)
    (verdict,) = load_summary(out).runs
    assert "empty-file" not in {finding.rule for finding in verdict.findings}
    assert verdict.ignored
    told = call("report", out, "--no-config", "--json")  # nothing is lost: another choice needs no new scan
    (again,) = json.loads(told.stdout)["runs"]
    assert again["ignored"] == 0
    (entry,) = [entry for entry in again["findings"] if entry["rule"] == "empty-file"]
    assert entry["docs"] == "docs/rules.md#empty-file"


def test_select_tells_only_of_what_is_named(tmp_path: Path) -> None:
    """By severity; a name that stands for nothing is bad usage with a near match."""
    runs = run_of(tmp_path)
    saved(runs, 20).write_bytes(b"")
    common = ("scan", runs, "--out", tmp_path / "out", "--no-plots", "--no-config")
    done = call(*common, "--select", "error", "--json")
    assert {f["rule"] for f in json.loads(done.stdout)["runs"][0]["findings"]} == {"empty-file"}
    wrong = call(*common, "--ignore", "empty-fil3")
    assert wrong.exit_code == 2
    assert "did you mean empty-file?" in wrong.stderr


def test_names_stand_for_rules_by_their_beginning() -> None:
    """An exact id stands for itself alone."""
    assert matching(["base-*"]) == matching(["base-"]) == {rule for rule in RULES if rule.startswith("base-")}
    assert matching(["nonfinite", "error"]) == {"nonfinite", "error"}


def test_inspect_and_scan_have_the_same_bounds(tmp_path: Path) -> None:
    """Dead and exploded modules of one file are those of the run's last checkpoint."""
    runs = {finding.rule: finding for finding in sick_modules(tmp_path)}
    alone = {f.rule for f in inspect_file(saved(tmp_path / "runs", 40)).findings}
    assert {"dead-modules", "outlier-modules", "larger-than-weight"} <= alone & set(runs)
    assert "self_attn.q_proj" in runs["dead-modules"].message


def test_each_rule_has_a_case_and_a_heading() -> None:
    """Of files on disk, in the table above; where a finding's link leads."""
    assert set(CASES) == set(RULES)
    page = (Path(__file__).parent.parent / "docs" / "rules.md").read_text("utf-8").splitlines()
    for rule, entry in RULES.items():
        assert page.count(f"## {rule}") == 1
        assert anchor(rule) == f"docs/rules.md#{rule}"
        assert entry.why.endswith(".")
        assert entry.fix.endswith(".")


def test_inspect_reads_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Severities, what is ignored, and bounds, as a scan does; of two files as well; the command line wins."""
    sick_modules(tmp_path)
    file = saved(tmp_path / "runs", 40)
    monkeypatch.chdir(tmp_path)
    rules = {
        finding["rule"]: finding["severity"]
        for finding in json.loads(call("inspect", file, "--json").stdout)["findings"]
    }
    assert rules["outlier-modules"] == rules["larger-than-weight"] == "warning"
    settings = 'ignore = "dead-*"\n[severity]\nlarger-than-weight = "error"\n[thresholds]\noutlier_factor = 1e9\n'
    (tmp_path / "lora-forensics.toml").write_text(settings)
    told = json.loads(call("inspect", file, "--json").stdout)["findings"]
    assert {finding["rule"]: finding["severity"] for finding in told} == {"larger-than-weight": "error"}
    both = json.loads(call("inspect", file, saved(tmp_path / "runs", 30), "--json").stdout)
    assert "outlier-modules" not in json.dumps(both)
    assert "dead-modules" in call("inspect", file, "--json", "--no-config").stdout
    assert "dead-modules" in call("inspect", file, "--json", "--ignore", "info").stdout


def test_a_module_that_moves_next_to_nothing_is_dead_to_inspect_and_to_scan(tmp_path: Path) -> None:
    """By the same factor of the same median."""
    sick_modules(tmp_path)
    file = saved(tmp_path / "runs", 40)
    rewrite(file, lambda name, tensor: tensor * (1e-5 if "layers.3" in name and "lora_B" in name else 1))
    (dead,) = [f for f in inspect_file(file).findings if f.rule == "dead-modules"]
    assert "layers.3" in dead.message
    (told,) = [f for f in scanned(tmp_path / "runs") if f.rule == "dead-modules"]
    assert set(re.findall(r"layers\.\d", told.message)) == set(re.findall(r"layers\.\d", dead.message))


def test_verbose_names_the_rule(tmp_path: Path) -> None:
    """So that `rules RULE` and --ignore can be given it."""
    common = ("scan", run_of(tmp_path), "--out", tmp_path / "out", "--no-plots", "--no-config")
    assert "(larger-than-weight)" in call(*common, "-v").stdout
    assert "(larger-than-weight)" not in call(*common).stdout


def test_thresholds_move_the_bounds() -> None:
    """A module of twice the usual size is an outlier by a factor of 1.5, not by 10."""
    names = ["a", "b", "c", "d", "e"]
    layers = layers_of({name: wavy(12) for name in names}, component="unet", role="q", adapter="lora")
    layers = layers.with_columns(delta_norm=pl.when(pl.col("module") == "a").then(2.0).otherwise(1.0))
    strict = AssessOptions(thresholds=Thresholds(outlier_factor=1.5))
    assert "outlier-modules" not in {f.rule for f in of_tables(layers)}
    assert "outlier-modules" in {f.rule for f in of_tables(layers, options=strict)}


def test_half_of_the_way_is_also_told_without_outliers() -> None:
    """A module that explodes late is most of the way: the checkpoint that the others name is a candidate."""
    names = ["a", "b", "c", "d", "e"]
    layers = layers_of({name: wavy(20) for name in names}, component="unet", role="q", adapter="lora")
    steps = sorted(set(layers["step"].to_list()))
    late = (pl.col("module") == "a") & (pl.col("step") >= steps[-3])
    layers = layers.with_columns(
        delta_norm=pl.when(late).then(1000.0).otherwise(1.0), step_size=pl.when(late).then(500.0).otherwise(0.1)
    )
    verdict = assess(layers).verdict
    whys = {candidate.why: candidate.step for candidate in verdict.candidates}
    assert verdict.keep is not None
    assert verdict.keep.step == whys["half of the way"] >= steps[-4]
    assert whys["half of the way without outliers"] in steps[4:7]  # most of the way is to the first
    calm = assess(layers.filter(pl.col("module") != "a")).verdict
    assert "half of the way without outliers" not in {candidate.why for candidate in calm.candidates}


def test_rules_are_listed_and_explained() -> None:
    """By severity; one by its id; as JSON; what does not exist is bad usage."""
    listed = call("rules").stdout
    assert all(rule in listed for rule in RULES)
    one = call("rules", "nonfinite").stdout
    assert one.startswith("nonfinite (error)")
    assert RULES["nonfinite"].fix.split()[0] in one
    document = json.loads(call("rules", "nonfinite", "--json").stdout)["rules"]
    assert document["nonfinite"]["docs"] == "docs/rules.md#nonfinite"
    wrong = call("rules", "nonfinit")
    assert wrong.exit_code == 2
    assert "did you mean nonfinite?" in wrong.stderr
