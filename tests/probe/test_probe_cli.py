"""`probe` from the command line: the verdict, what is remembered, and how it ends."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from cli_runs import checkpoint, peft_run, project
from click.testing import CliRunner, Result

from lora_forensics.cli import main
from lora_forensics.probed import Score, load_probed

SCORER = """
import json, pathlib, re, sys
path, mode = sys.argv[1], (sys.argv + ["plain"])[2]
step = int(re.search(r"checkpoint-(\\d+)", path).group(1))
log = pathlib.Path(__file__).with_suffix(".log")
log.open("a").write(f"{step}\\n")
loss = abs(step - BEST) / 100
if mode == "samples": print([loss + place + 0.01 * ((step * (place + 1)) % 7) for place in range(4)])
elif mode == "some" and step % 20: raise ValueError("odd ones fail")
elif mode == "never": print("nan")
elif mode == "hang":
    import time; print(loss, flush=True); time.sleep(600 if step >= 60 else 0)
elif mode == "higher": print(-loss)
else: print(loss)
"""


def call(*arguments: str | Path) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A run of 12 checkpoints without held-out losses, and a script that scores step 40 best."""
    project(tmp_path / "runs")
    (tmp_path / "score.py").write_text(SCORER.replace("BEST", "40"))
    return tmp_path


def command(place: Path, mode: str = "plain") -> str:
    """The scorer's command line."""
    return f"{shlex.quote(sys.executable)} {shlex.quote((place / 'score.py').as_posix())} {{checkpoint}} {mode}"


def probe(place: Path, *arguments: str, mode: str = "plain") -> Result:
    """Probe the run."""
    return call("probe", place / "runs", "--out", place / "out", "--score", command(place, mode), *arguments)


def asked(place: Path) -> list[int]:
    """Steps that the script was run for, in order."""
    log = place / "score.log"
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def verdict(place: Path) -> dict[str, object]:
    """verdict.json, which is also in summary.json."""
    found = json.loads((place / "out" / "run" / "verdict.json").read_text("utf-8"))
    assert json.loads((place / "out" / "summary.json").read_text("utf-8"))["runs"] == [found]
    return dict(found)


def test_the_answer_stands_everywhere(place: Path) -> None:
    """Verdict, summary, table of runs, plots, terminal, `pick`, and a later scan with nothing new."""
    result = probe(place)
    assert result.exit_code == 0, result.output
    assert "best answer to the probe: 0 at step 40" in result.stdout
    found = verdict(place)
    assert found["keep"] == {
        "checkpoint": "checkpoint-40/adapter_model.safetensors",
        "step": 40,
        "epoch": 1.0,
        "rests_on": "probe",
    }
    assert pl.read_parquet(place / "out" / "runs.parquet")["rests_on"].to_list() == ["probe"]
    assert "best answer to the probe" in (place / "out" / "summary.md").read_text("utf-8")
    assert (place / "out" / "run" / "plots" / "similarity.png").exists()
    before = len(asked(place))
    assert before <= 6
    picked = call("pick", place / "runs", "--out", place / "out")
    assert picked.stdout.strip().endswith("checkpoint-40/adapter_model.safetensors")
    again = call("scan", place / "runs", "--out", place / "out")
    assert "nothing new" in again.stdout
    assert verdict(place) == found
    rendered = call("report", place / "out", "--window", "2")
    assert "best answer to the probe" in rendered.stdout
    assert len(asked(place)) == before


def test_scores_are_remembered(place: Path) -> None:
    """Probing again asks for nothing; a larger budget only for what is new; another scorer for all of it."""
    probe(place, "--evaluations", "4")
    first = asked(place)
    assert len(first) == 4
    assert "4 known before" in probe(place, "--evaluations", "4").stdout
    assert asked(place) == first
    probe(place)
    assert len(asked(place)) == len(set(asked(place))) == 6
    probe(place, "--rescan", "--evaluations", "4")
    assert asked(place)[6:] == first
    probe(place, "--evaluations", "3", mode="samples")
    assert len(asked(place)) == 13


def test_another_probe_at_the_same_time_keeps_its_scores(place: Path) -> None:
    """Both write into one file: what the other has found meanwhile stays."""
    folder, other = place / "out" / "run", Score("checkpoint-10", "print", "another scorer", 1.5)
    (place / "beside.py").write_text(
        "import sys, pathlib\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from lora_forensics.probed import Score, load_probed, save_probed\n"
        "folder = pathlib.Path(sys.argv[2])\n"
        f"save_probed(folder, load_probed(folder).with_score({other!r}))\n"
        "print(1)\n"
    )
    words = [sys.executable, (place / "beside.py").as_posix(), "{checkpoint}", folder.as_posix()]
    result = call("probe", place / "runs", "--out", place / "out", "--score", shlex.join(words), "--evaluations", "2")
    assert result.exit_code == 0, result.output
    scores = load_probed(folder).scores
    assert other in scores
    assert len(scores) == 3


def test_a_file_that_changed_is_scored_again(place: Path) -> None:
    """And only that one."""
    probe(place)
    first = asked(place)
    checkpoint(place / "runs" / "run" / "checkpoint-40", 41, "../base.safetensors")
    probe(place)
    assert asked(place)[len(first) :] == [40]


def test_later_checkpoints_make_it_stale_until_it_is_probed_again(place: Path) -> None:
    """The answer stays and says so."""
    probe(place)
    longer = peft_run(place / "longer", 16, base="../base.safetensors")
    for step in (130, 140, 150, 160):
        shutil.copytree(longer / f"checkpoint-{step}", place / "runs" / "run" / f"checkpoint-{step}")
    result = call("scan", place / "runs", "--out", place / "out", "-v")
    assert "came after the probe" in " ".join(result.stdout.split())
    found = verdict(place)
    assert "probe-stale" in {finding["rule"] for finding in found["findings"]}  # type: ignore[attr-defined]
    assert found["keep"]["rests_on"] == "probe"  # type: ignore[index]
    probe(place)
    assert "probe-stale" not in {finding["rule"] for finding in verdict(place)["findings"]}  # type: ignore[attr-defined]


def test_a_probe_is_gone_with_the_files_that_it_scored(place: Path) -> None:
    """Nothing that was scored is left: the weights decide again."""
    probe(place)
    for step in asked(place):
        shutil.rmtree(place / "runs" / "run" / f"checkpoint-{step}")
    call("scan", place / "runs", "--out", place / "out")
    assert verdict(place)["keep"] is None or verdict(place)["keep"]["rests_on"] != "probe"  # type: ignore[index]


def test_an_explicit_probe_stands_beside_logged_losses(tmp_path: Path) -> None:
    """A person who probes wants its answer; what the trainer logged is still among the candidates."""
    project(tmp_path / "runs", losses=[abs(place - 4) + 1.0 for place in range(12)])
    (tmp_path / "score.py").write_text(SCORER.replace("BEST", "90"))
    assert probe(tmp_path, "--evaluations", "8").exit_code == 0
    found = verdict(tmp_path)
    assert found["keep"]["rests_on"] == "probe"  # type: ignore[index]
    assert found["keep"]["step"] == 90  # type: ignore[index]
    assert "lowest held-out loss" in {entry["why"] for entry in found["candidates"]}  # type: ignore[attr-defined]
    assert found["evidence"]["held_out"]["step"] == 50  # type: ignore[index]


def test_samples_give_intervals(place: Path) -> None:
    """A JSON list: differences are paired, and what they cannot tell apart is a set."""
    probe(place, mode="samples")
    found = verdict(place)["evidence"]["probe"]  # type: ignore[index]
    assert found["samples"] == 4
    assert all(len(entry["interval"]) == 2 for entry in found["evaluations"])
    assert found["runner_up"]["worse_by"] >= 0


def test_higher_can_be_better(place: Path) -> None:
    """The same curve upside down."""
    probe(place, "--maximise", mode="higher")
    assert verdict(place)["keep"]["step"] == 40  # type: ignore[index]


def test_some_failing_are_told_and_the_search_goes_on(place: Path) -> None:
    """Exit 0, each failure with its reason and the last lines of stderr."""
    result = probe(place, "--evaluations", "8", mode="some")
    assert result.exit_code == 0, result.output
    assert "has no score: ended with code 1" in result.stderr
    assert "odd ones fail" in result.stderr
    assert verdict(place)["keep"]["step"] == 40  # type: ignore[index]
    assert verdict(place)["evidence"]["probe"]["failed"]  # type: ignore[index]


def test_all_failing_is_an_error_and_leaves_the_verdict(place: Path) -> None:
    """Exit 2; what was kept before is kept."""
    result = probe(place, mode="never")
    assert result.exit_code == 2
    assert "got a score" in result.stderr
    assert "not finite" in result.stderr
    assert json.loads((place / "out" / "run" / "verdict.json").read_text("utf-8"))["keep"]["rests_on"] == "weights"


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX processes")
def test_a_scorer_that_hangs_costs_its_time_limit(place: Path) -> None:
    """Late checkpoints hang; the early ones answer, several at once."""
    result = probe(place, "--timeout", "1", "--workers", "4", "--evaluations", "8", mode="hang")
    assert result.exit_code == 0, result.output
    assert "took longer than 1 seconds" in result.stderr
    assert verdict(place)["keep"]["step"] == 40  # type: ignore[index]


def test_workers_change_nothing_but_the_order(place: Path) -> None:
    """Each checkpoint once, no more than were allowed; the answer needs more of them, chosen with less knowledge."""
    assert probe(place, "--workers", "3", "--evaluations", "9").exit_code == 0
    assert len(asked(place)) == len(set(asked(place))) <= 9
    assert verdict(place)["keep"]["step"] == 40  # type: ignore[index]


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_killed_probe_goes_on_where_it_was(place: Path) -> None:
    """SIGKILL while the third is scored: the first two are not scored again."""
    script = SCORER.replace("BEST", "40").replace("else: print(loss)", "else:\n    PAUSE\n    print(loss)")
    third = "len(log.read_text().split()) == 3"
    pause = f"import os, time; {third} and (log.with_suffix('.pid').write_text(str(os.getpid())), time.sleep(600))"
    (place / "score.py").write_text(script.replace("PAUSE", pause))
    words = [sys.executable, "-m", "lora_forensics", "probe", str(place / "runs"), "--out", str(place / "out")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    running = subprocess.Popen([*words, "--score", command(place)], env=environment, stdout=subprocess.DEVNULL)
    for _ in range(600):
        if (place / "score.pid").exists() and (place / "score.pid").read_text():
            break
        time.sleep(0.1)
    running.send_signal(signal.SIGKILL)
    running.wait()
    os.kill(int((place / "score.pid").read_text()), signal.SIGKILL)
    assert len(json.loads((place / "out" / "run" / "probe.json").read_text("utf-8"))["scores"]) == 2
    assert probe(place).exit_code == 0
    steps = asked(place)
    assert len(steps) == 7
    assert steps[3] == steps[2]
    assert len(set(steps)) == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing says how to score"),
        (["--score", "python score.py"], "where the checkpoint goes"),
        (["--score", "python {checkpoint}", "--held-out", "x.txt"], "one way to score"),
        (["--held-out", "nowhere.txt"], "does not exist"),
        (["--held-out", "README.md"], "neither .txt nor .jsonl|does not exist"),
        (["--held-out", ".", "--maximise"], "goes with --score alone"),
        (["--held-out", ".", "--timeout", "3"], "goes with --score alone"),
        (["--score", "x {checkpoint}", "--evaluations", "0"], "evaluations"),
        (["--score", "x {checkpoint}", "--timeout", "-1"], "timeout"),
    ],
)
def test_bad_usage_is_2_with_what_to_do(place: Path, arguments: list[str], said: str) -> None:
    """No traceback, no work."""
    result = call("probe", place / "runs", "--out", place / "out", *arguments)
    assert result.exit_code == 2, result.output
    assert any(part in result.stderr for part in said.split("|")), result.stderr
    assert "Traceback" not in result.output


def test_a_run_without_its_base_can_be_probed_by_a_command(place: Path) -> None:
    """A score needs no cosines."""
    (place / "runs" / "base.safetensors").unlink()
    result = probe(place)
    assert result.exit_code == 0, result.output
    assert verdict(place)["status"] == "no_base_model"
    assert verdict(place)["keep"]["rests_on"] == "probe"  # type: ignore[index]


def test_two_runs_are_a_choice_to_make(tmp_path: Path) -> None:
    """As with `pick`."""
    project(tmp_path / "runs", ["a", "b"])
    (tmp_path / "score.py").write_text(SCORER.replace("BEST", "40"))
    result = probe(tmp_path)
    assert result.exit_code == 2
    assert "holds 2 runs" in result.stderr
    call("scan", tmp_path / "runs", "--out", tmp_path / "out")
    named = call("probe", tmp_path / "runs" / "a", "--out", tmp_path / "out", "--score", command(tmp_path), "--json")
    assert named.exit_code == 0, named.output
    assert json.loads(named.stdout)["runs"][0]["keep"]["rests_on"] == "probe"
    kept = [run["keep"]["rests_on"] for run in json.loads((tmp_path / "out" / "summary.json").read_text())["runs"]]
    assert kept == ["probe", "weights"]
