"""Docs are checked like code: commands run, transcripts are real, generated pages are fresh, names exist.

`LORA_FORENSICS_REGENERATE=1` writes what this machine prints into the docs instead of comparing.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import click
import pytest

from lora_forensics.adapters import KINDS
from lora_forensics.analyses import ANALYSES
from lora_forensics.checkpoints import TRAINERS
from lora_forensics.cli import main
from lora_forensics.detectors import DETECTORS
from lora_forensics.engines import ENGINES
from lora_forensics.formats import formats_markdown
from lora_forensics.metrics import METRICS
from lora_forensics.records import Status
from lora_forensics.reference import columns_markdown
from lora_forensics.reports import REPORTS
from lora_forensics.reports.text import RESTS_ON
from lora_forensics.rule_pages import rules_markdown
from lora_forensics.settings import settings_markdown

REPOSITORY = Path(__file__).parent.parent
REGENERATE = os.environ.get("LORA_FORENSICS_REGENERATE") == "1"
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
CONSOLE = re.compile(r"```console\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"^\$ (lora-forensics .*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with the sample runs, where commands may write."""
    (tmp_path / "sample_runs").symlink_to(REPOSITORY / "sample_runs", target_is_directory=True)
    return tmp_path


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command as a person would type it, on a terminal of 80 columns."""
    words = [sys.executable, "-m", "lora_forensics", *shlex.split(command)[1:]]
    environment = {**os.environ, "COLUMNS": "80", "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "error"}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_transcripts_are_what_is_printed(page: Path, workplace: Path) -> None:
    """Every command of a console block is run, in order, and prints what stands below it."""
    text = page.read_text("utf-8")
    for block in CONSOLE.findall(text):
        shown = block
        for command, printed in COMMAND.findall(block):
            result = run(command, workplace)
            assert result.returncode == 0, result.stderr
            if not REGENERATE:
                assert result.stdout.splitlines() == printed.splitlines(), command
            shown = shown.replace(f"$ {command}\n{printed}", f"$ {command}\n{result.stdout}")
        text = text.replace(block, shown)
    if REGENERATE:
        page.write_text(text, "utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library examples work where the sample runs are."""
    monkeypatch.chdir(workplace)
    for code in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
        exec(compile(code, page.name, "exec"), {})  # noqa: S102 - our own documentation


def test_the_page_of_columns_is_fresh() -> None:
    """docs/columns.md is what `metrics --markdown` prints (`make docs`)."""
    page = REPOSITORY / "docs" / "columns.md"
    if REGENERATE:
        page.write_text(columns_markdown(), "utf-8")
    assert page.read_text("utf-8") == columns_markdown()


def test_the_pages_of_rules_and_settings_are_fresh() -> None:
    """docs/rules.md and docs/configuration.md are made from the tables."""
    for name, text in (("rules", rules_markdown()), ("configuration", settings_markdown())):
        page = REPOSITORY / "docs" / f"{name}.md"
        if REGENERATE:
            page.write_text(text, "utf-8")
        assert page.read_text("utf-8") == text


def test_the_page_of_formats_is_fresh() -> None:
    """docs/formats.md is what `formats --markdown` prints (`make docs`)."""
    page = REPOSITORY / "docs" / "formats.md"
    if REGENERATE:
        page.write_text(formats_markdown(), "utf-8")
    assert page.read_text("utf-8") == formats_markdown()


def test_links_between_pages_lead_somewhere() -> None:
    """Relative links and pictures exist."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text("utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_command_and_option_is_described() -> None:
    """Commands stand in the README; each option has a help text."""
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    assert isinstance(main, click.Group)
    for name, command in main.commands.items():
        assert f"`{name}" in readme
        assert command.help
        for parameter in command.params:
            assert isinstance(parameter, click.Argument) or parameter.help, (name, parameter.name)  # type: ignore[attr-defined]


def test_every_option_of_the_docs_exists() -> None:
    """No page promises an option that is not there."""
    assert isinstance(main, click.Group)
    known = {o for command in main.commands.values() for parameter in command.params for o in parameter.opts}
    scripts = "".join(path.read_text("utf-8") for path in (REPOSITORY / "benchmarks").rglob("*.py"))
    others = {"--version", *re.findall(r'"(--[a-z-]+)"', scripts)}
    for page in PAGES:
        for option in re.findall(r"(?<![\w-])(--[a-z][a-z_-]+)", page.read_text("utf-8")):
            # with an underscore it is a trainer's
            assert option in known | others or "_" in option, f"{page.name}: {option}"


def test_every_variant_is_documented() -> None:
    """Trainers, kinds, detectors, engines and reports have a place in the docs."""
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    for name in (*TRAINERS, *DETECTORS):
        assert f"`{name}`" in text, name
    for name in ANALYSES:
        assert f"`--analysis {name}`" in text, name
    for name in (*KINDS, *REPORTS, *(metric.column.name for metric in METRICS)):
        assert name.lower() in text.lower(), name


def test_every_key_of_a_verdict_is_explained(workplace: Path) -> None:
    """docs/verdict.md knows each state, and all that verdict.json of a real run holds."""
    page = (REPOSITORY / "docs" / "verdict.md").read_text("utf-8")
    assert run("lora-forensics scan sample_runs/text_peft --no-plots -q", workplace).returncode == 0
    verdict = json.loads((workplace / "forensics" / "output" / "verdict.json").read_text("utf-8"))
    inner = [key for part in ("keep", "turning_point", "evidence", "base_model") for key in verdict[part]]
    words = [*get_args(Status), *RESTS_ON, *verdict, *inner, *verdict["candidates"][0], *verdict["findings"][0]]
    assert [word for word in words if f"`{word}`" not in page] == []


def test_the_recipes_name_real_places() -> None:
    """Every file and table of docs/contributing.md exists."""
    text = (REPOSITORY / "docs" / "contributing.md").read_text("utf-8")
    package = REPOSITORY / "lora_forensics"
    for path, name in re.findall(r"after `([\w/]+\.py):(\w+)`", text):
        assert f"class {name}(" in (package / path).read_text("utf-8")
    for table, path in re.findall(r"`([A-Z]+)` in `([\w/]+\.py)`", text):
        assert re.search(rf"^{table}\b", (package / path).read_text("utf-8"), re.MULTILINE)
    assert len(ENGINES) >= 1


def test_the_readme_is_short() -> None:
    """Under 200 lines."""
    assert len((REPOSITORY / "README.md").read_text("utf-8").splitlines()) < 200
