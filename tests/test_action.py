"""The GitHub action and the pre-commit hook: the same steps, run here as the runner would run them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_runs import base_model, checkpoint, project
from schemas import problems, stored_schemas
from test_cli import LOSSES, REPOSITORY, call

ACTION = yaml.safe_load((REPOSITORY / "action.yml").read_text("utf-8"))
HOOKS = yaml.safe_load((REPOSITORY / ".pre-commit-hooks.yaml").read_text("utf-8"))
BASH = ["bash", "--noprofile", "--norc", "-eo", "pipefail"]
"""How the runner calls `shell: bash`."""

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs bash")


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    """JSON schemas by their address."""
    return stored_schemas()


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment into which the action's own step installed the tool; the libraries are those of this one."""
    folder = tmp_path_factory.mktemp("runner")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    (site,) = (folder / "env").rglob("site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"], "utf-8")
    source = folder / "the action"  # a copy: building must leave nothing in the repository
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "action.yml"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(REPOSITORY / "lora_forensics", source / "lora_forensics", ignore=shutil.ignore_patterns("*.pyc"))
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done, _, _ = step("Install", folder, folder / "env" / "bin", {"SOURCE": str(source), **offline})
    assert done.returncode == 0, done.stderr
    return folder / "env" / "bin"


def step(
    name: str, folder: Path, tools: Path, environment: Mapping[str, str] | None = None, **inputs: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, str], str]:
    """Run a step with these inputs; gives what it printed, its outputs, and the job's summary."""
    (found,) = [entry for entry in ACTION["runs"]["steps"] if entry["name"] == name]
    known = {key: value.get("default", "") for key, value in ACTION["inputs"].items()} | inputs
    variables = {
        variable: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda use: known[use[1]], value)
        for variable, value in found["env"].items()
    }
    output, summary, script = (folder / f"{part}.{name}" for part in ("output", "summary", "script"))
    script.write_text(found["run"], "utf-8")
    output.write_text("")
    summary.write_text("")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_"))}
    told = {"GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(summary)}
    path = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [*BASH, str(script)],
        cwd=folder,
        env={**inherited, **variables, **path, **told, **(environment or {})},
        capture_output=True,
        text=True,
    )
    said = re.findall(r"^(\w+)<<(\w+)\n(.*?)\n\2$", output.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return done, {key: value for key, _, value in said}, summary.read_text("utf-8")


def test_no_input_is_read_by_the_shell() -> None:
    """Inputs reach scripts as variables; a script holds no expression that the runner fills in."""
    for entry in ACTION["runs"]["steps"]:
        assert "${{" not in entry["run"]
        assert entry["shell"] == "bash"
    assert set(ACTION["outputs"]) == {"keep", "status", "report"}


def test_the_action_and_the_examples_are_valid(schemas: dict[str, Any]) -> None:
    """By the schemas of those who read them: GitHub's actions and workflows, GitLab's pipelines, pre-commit."""
    store = "https://json.schemastore.org"
    gitlab = "https://gitlab.com/gitlab-org/gitlab/-/raw/master/app/assets/javascripts/editor/schema/ci.json"
    page = (REPOSITORY / "docs" / "ci.md").read_text("utf-8")
    workflow, pipeline, commit = map(yaml.safe_load, re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    assert problems(schemas[f"{store}/github-action.json"], ACTION) == []
    assert problems(schemas[f"{store}/github-workflow.json"], {"on": "push", **workflow}) == []
    assert problems(schemas[gitlab], pipeline) == []
    assert problems(schemas[f"{store}/pre-commit-config.json"], commit) == []
    (step,) = [entry for entry in workflow["jobs"]["checkpoints"]["steps"] if "OWNER" in entry.get("uses", "")]
    assert set(step["with"]) <= set(ACTION["inputs"])
    assert set(re.findall(r"outputs\.(\w+)", str(workflow))) <= set(ACTION["outputs"])


def test_the_action_answers(tmp_path: Path, runner: Path) -> None:
    """Outputs, summary and annotations of two runs; odd names are arguments and nothing else."""
    odd = "a $(touch pwned) `touch pwned`;"
    project(tmp_path / odd, ["a", "::error::b"], losses=LOSSES)
    done, outputs, summary = step("Scan", tmp_path, runner, runs=f"{odd}\n", out="the out", args="--no-plots\r\n-v")
    assert done.returncode == 0, done.stderr
    kept = outputs["keep"].splitlines()
    assert len(kept) == 2
    assert all(Path(path).is_file() for path in kept)
    verdicts = json.loads((tmp_path / "the out" / "summary.json").read_text("utf-8"))["runs"]
    assert outputs["status"].splitlines() == [verdict["status"] for verdict in verdicts]
    assert outputs["report"] == "the out"
    assert {"junit.xml", "results.sarif", "summary.json"} <= {path.name for path in (tmp_path / "the out").iterdir()}
    assert summary.startswith("# Which checkpoint to keep")
    assert "![" not in summary
    assert not (tmp_path / "pwned").exists()
    lines = done.stdout.splitlines()
    (stop,) = [at for at, line in enumerate(lines) if line.startswith("::stop-commands::")]
    end = lines.index(f"::{lines[stop].removeprefix('::stop-commands::')}::")
    assert any("checkpoint-50" in line for line in lines[stop:end])
    assert any(line.startswith("::warning ") and "last-is-past" in line for line in lines[end:])


def test_the_action_fails_as_asked(tmp_path: Path, runner: Path) -> None:
    """The exit code is the scan's; with findings there are reports, with --redact those to share, else none."""
    project(tmp_path / "runs", losses=LOSSES)
    done, outputs, summary = step(
        "Scan", tmp_path, runner, runs="runs", args="--no-plots\n--redact", **{"fail-on": "nonfinite\nwarning"}
    )
    assert done.returncode == 1
    assert outputs["report"] == "forensics/redacted"
    assert summary
    assert "runs/run" not in summary + done.stdout
    assert not (tmp_path / "forensics" / "redacted" / "runs").exists()
    done, outputs, summary = step("Scan", tmp_path, runner, runs="nowhere")
    assert (done.returncode, outputs, summary) == (2, {}, "")
    assert "nowhere does not exist" in done.stderr


def test_reports_are_there_whatever_the_exit_code(tmp_path: Path, runner: Path) -> None:
    """With --strict a damaged file ends with 2, and is told; a scan that ends before its reports shows no old ones."""
    saved = project(tmp_path / "runs") / "run" / "checkpoint-70" / "adapter_model.safetensors"
    saved.write_bytes(saved.read_bytes()[:-9])
    done, outputs, summary = step("Scan", tmp_path, runner, runs="runs", args="--no-plots\n--strict\n--redact\r")
    assert done.returncode == 2
    assert outputs["report"] == "forensics/redacted"
    assert "truncated" in summary
    assert "::warning title=1 file skipped" in done.stdout
    assert "adapter_model" not in summary
    done, outputs, summary = step("Scan", tmp_path, runner, runs="runs", args="--window\n1")
    assert (done.returncode, outputs, summary) == (2, {}, "")


def test_the_action_installs_itself_or_a_release(tmp_path: Path) -> None:
    """What is given to pip: the action's own folder, or the version that was asked for."""
    (found,) = [entry for entry in ACTION["runs"]["steps"] if entry["name"] == "Install"]
    (tmp_path / "python").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n", "utf-8")
    (tmp_path / "python").chmod(0o755)
    for version, expected in (("", "/the action[ci]"), ("1.2.3; x", "lora-forensics[ci]==1.2.3; x")):
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VERSION": version, "SOURCE": "/the action"}
        done = subprocess.run([*BASH, "-c", found["run"]], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == expected


def test_the_hook_finds_damaged_adapters(tmp_path: Path) -> None:
    """Its entry takes the changed files: sound adapters and base models pass, damaged and dead ones do not."""
    (hook,) = HOOKS
    command, *arguments = shlex.split(hook["entry"])
    assert command == "lora-forensics"
    sound = checkpoint(tmp_path / "sound", 10)
    base = base_model(tmp_path / "base.safetensors")
    assert re.search(hook["files"], base.name)
    result = call(*arguments, sound, base)
    assert (result.exit_code, result.stdout) == (0, "")
    cut, still = checkpoint(tmp_path / "cut", 10), checkpoint(tmp_path / "still", 0)
    cut.write_bytes(cut.read_bytes()[:-4])
    result = call(*arguments, sound, cut, still, base)
    assert result.exit_code == 1
    assert re.search(r"cut/adapter_model\.safetensors: .*truncated", result.stdout)
    assert re.search(r"still/adapter_model\.safetensors: error: zero-change: ", result.stdout)
    assert "sound" not in result.stdout
    assert call("check", still, "--fail-on", "nonfinite").exit_code == 0
