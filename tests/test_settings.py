"""The configuration file: where it is looked for, what it may say, and that the command line wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from cli_runs import project
from click.testing import CliRunner, Result

from lora_forensics.cli import main
from lora_forensics.commands.configured import _defaults
from lora_forensics.errors import UsageError
from lora_forensics.settings import KINDS, SETTINGS, Settings, find_settings, read_settings

NOT_IN_A_FILE = {"json", "quiet", "rescan", "config", "no-config", "runs", "write-baseline", "redact"}
"""Of one run of the command, not of a project."""


def written(path: Path, text: str) -> Path:
    """A file of settings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with one run, whose held-out loss is lowest at step 50; the current folder."""
    project(tmp_path / "runs", losses=[abs(place - 4) + 1.0 for place in range(12)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str | Path) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def verdict(place: Path, out: str = "forensics") -> dict[str, Any]:
    """What the summary says of the run."""
    found: dict[str, Any] = json.loads((place / out / "summary.json").read_text("utf-8"))["runs"][0]
    return found


def test_every_option_of_scan_is_a_setting_and_every_setting_an_option() -> None:
    """In the type that its option takes: one value or several, true or false."""
    assert isinstance(main, click.Group)
    options = {o.removeprefix("--"): p for p in main.commands["scan"].params for o in p.opts if o.startswith("--")}
    named = {setting.name: setting for setting in SETTINGS}
    assert set(named) == set(options) - NOT_IN_A_FILE
    for name, setting in named.items():
        option = options[name]
        assert isinstance(option, click.Option)
        assert option.multiple == (list in KINDS[setting.kind]), name
        assert option.is_flag == (bool in KINDS[setting.kind]), name


def test_every_example_of_the_table_is_accepted(tmp_path: Path) -> None:
    """By the reader, and by the options."""
    path = written(tmp_path / "lora-forensics.toml", "\n".join(f"{s.name} = {s.example}" for s in SETTINGS))
    found = read_settings(path)
    assert set(found.options) == {setting.name for setting in SETTINGS}
    assert isinstance(main, click.Group)
    scan = main.commands["scan"]
    context = scan.make_context("scan", [str(tmp_path), "--no-config"], default_map=None)
    context.default_map = _defaults(scan, found.options)
    assert context.lookup_default("window") == "epoch"
    assert context.lookup_default("reports") == ("markdown",)


def test_the_nearest_file_counts(tmp_path: Path) -> None:
    """Upward from a folder; a pyproject.toml without the table is passed by; beside it the own file counts."""
    inner = tmp_path / "a" / "b"
    written(tmp_path / "lora-forensics.toml", "window = 5")
    written(inner / "pyproject.toml", "[tool.other]\nx = 1")
    assert find_settings(inner).options == {"window": 5}
    written(inner / "pyproject.toml", "[tool.lora-forensics]\nwindow = 6")
    assert find_settings(inner).options == {"window": 6}
    written(inner / "lora-forensics.toml", 'window = "epoch"\n[thresholds]\nfamily = 7')
    found = find_settings(inner)
    assert (found.options["window"], found.thresholds.family) == ("epoch", 7)
    assert Settings().path is None


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("windw = 5", "no setting is called 'windw'", "did you mean window?"),
        ("window = 5.5", "window is 5.5", "window ="),
        ("strict = 1", "strict is 1, not a true or false", "strict = true"),
        ("workers = true", "workers is true", "workers = 4"),
        ("ignore = [1]", "ignore is [1]", "ignore ="),
        ("severity = 3", "severity is 3, not a table", "[severity]"),
        ('[severity]\nnonfinit = "info"', "no rule is called 'nonfinit'", "did you mean nonfinite?"),
        ('[severity]\nnonfinite = "fatal"', "severity of nonfinite is 'fatal'", "info, warning, error"),
        ("[thresholds]\noutlier_facto = 3", "no threshold is called 'outlier_facto'", "did you mean outlier_factor?"),
        ('[thresholds]\nfamily = "4"', "threshold family is '4', not a whole number", "family = 4"),
        ("[thresholds]\nfamily = 0", "threshold family is 0", ""),
        ("[thresholds]\nzero_share = nan", "threshold zero_share is nan", ""),
        ("[thresholds]\nfamily = inf", "threshold family is inf, not a whole number", "family = 4"),
        ("[thresholds]\noutlier_factor = -inf", "threshold outlier_factor is -inf", ""),
        ("[thresholds]\noutlier_factor = [1]", "is [1], not a number", "outlier_factor = 10"),
        ("[[thresholds]]\nfamily = 4", "not a table", "[thresholds]"),
        ('fail-on = "error"\nfail_on = "info"', "fail-on is set twice", "leave one out"),
        ('ignore = "emty-file"', "ignore: no rule or severity is called 'emty-file'", "did you mean empty-file?"),
        ('select = ["warning", ""]', "select: no rule or severity is called ''", "lora-forensics rules"),
        ('fail-on = ["nofinite"]', "fail-on: no rule", "did you mean nonfinite?"),
        ('[severity]\n"base-*" = "info"', "severity: no rule is called 'base-*'", "lora-forensics rules"),
        ("window = 2\nwindow = 3", "is no TOML", "--no-config"),
        ("window = ", "is no TOML", "--no-config"),
        ("\x00", "is no TOML", "--no-config"),
    ],
)
def test_what_cannot_be_meant_is_an_error_with_a_way_out(text: str, message: str, hint: str, place: Path) -> None:
    """It names the file; exit code 2; `--no-config` goes on without it."""
    path = written(place / "lora-forensics.toml", text)
    with pytest.raises(UsageError) as caught:
        read_settings(path)
    assert message in caught.value.message
    assert str(path) in caught.value.message
    assert hint in caught.value.hint
    result = call("scan", "runs", "--no-plots")
    assert result.exit_code == 2
    assert "lora-forensics.toml" in result.stderr
    assert "Traceback" not in result.output
    assert call("pick", "runs", "--no-config").exit_code == 0


@pytest.mark.parametrize(
    "text", ["tool.lora-forensics = 3", "[[tool.lora-forensics]]\nwindow = 3", "[tool.lora_forensics]"]
)
def test_a_table_that_would_be_passed_by_is_an_error(text: str, tmp_path: Path) -> None:
    """Misspelled, or no table; other tools' are passed by."""
    written(tmp_path / "pyproject.toml", text)
    with pytest.raises(UsageError) as caught:
        find_settings(tmp_path)
    assert "pyproject.toml" in caught.value.message
    assert "[tool.lora-forensics]" in caught.value.hint
    written(tmp_path / "pyproject.toml", "tool = 3")
    assert find_settings(tmp_path).path is None


def test_files_as_editors_on_windows_save_them(tmp_path: Path) -> None:
    """With a byte order mark and CRLF; UTF-16 is no TOML."""
    path = tmp_path / "lora-forensics.toml"
    path.write_bytes(b'\xef\xbb\xbfwindow = 5\r\nignore = ["base-*"]\r\n[thresholds]\r\nfamily = 7\r\n')
    found = read_settings(path)
    assert (found.options["window"], found.options["ignore"], found.thresholds.family) == (5, ("base-*",), 7)
    path.write_bytes("window = 5".encode("utf-16"))
    with pytest.raises(UsageError, match="is no TOML"):
        read_settings(path)


def test_bounds_beyond_reach_find_nothing(place: Path) -> None:
    """Infinity and whole numbers of any size are bounds that nothing passes."""
    bounds = (
        f"relative_norm = inf\nzero_share = 2\nrewritten_seconds = inf\nfamily = {10**30}\nfew_checkpoints = {10**30}"
    )
    written(place / "lora-forensics.toml", f"[thresholds]\n{bounds}")
    assert call("scan", "runs", "--no-plots").exit_code == 0
    assert "larger-than-weight" not in {finding["rule"] for finding in verdict(place)["findings"]}


def test_ignore_on_the_command_line_replaces_that_of_the_file(place: Path) -> None:
    """The whole list; what is selected and ignored is ignored."""
    written(place / "lora-forensics.toml", 'ignore = ["larger-than-weight"]\nselect = ["warning"]')
    told = [
        json.loads(call("scan", "runs", "--no-plots", "--json", *more).stdout)["runs"][0]
        for more in ((), ("--ignore", "last-*"))
    ]
    rules = [{finding["rule"] for finding in run["findings"]} for run in told]
    assert rules == [{"last-is-past"}, {"larger-than-weight"}]


def test_a_file_sets_what_the_command_line_does_not(place: Path) -> None:
    """Window, output, exit code; an option wins."""
    written(place / "lora-forensics.toml", 'window = 2\nout = "there"\nno-plots = true\nfail-on = "last-is-past"')
    assert call("scan", "runs").exit_code == 1
    assert verdict(place, "there")["window"] == 2
    assert not list((place / "there").rglob("*.png"))
    assert call("scan", "runs", "--window", "3", "--fail-on", "nonfinite").exit_code == 0
    assert verdict(place, "there")["window"] == 3
    assert call("scan", "runs", "--no-config", "--no-plots").exit_code == 0
    assert (place / "forensics").is_dir()


def test_a_named_file_counts_and_must_exist(place: Path) -> None:
    """Whatever lies nearer; it and its absence cannot both be asked for."""
    written(place / "lora-forensics.toml", "window = 2")
    written(place / "other" / "mine.toml", 'window = 3\nbase = "../runs/base.safetensors"')
    assert call("scan", "runs", "--config", "other/mine.toml", "--no-plots").exit_code == 0
    assert verdict(place)["window"] == 3
    assert call("scan", "runs", "--config", "none.toml").exit_code == 2
    for order in (("--config", "other/mine.toml", "--no-config"), ("--no-config", "--config", "other/mine.toml")):
        assert "contradict" in call("scan", "runs", *order).stderr


def test_severities_and_thresholds_renew_stored_verdicts(place: Path) -> None:
    """Nothing is measured again; a severity counts for the exit code, a bound for what is found."""
    common = ("scan", "runs", "--no-plots")
    assert call(*common).exit_code == 0
    large = [f for f in verdict(place)["findings"] if f["rule"] == "larger-than-weight"]
    assert large
    written(place / "lora-forensics.toml", '[severity]\n"last-is-past" = "error"\n[thresholds]\nrelative_norm = 1e6')
    result = call(*common, "--fail-on", "error")
    assert result.exit_code == 1
    assert "last-is-past (error)" in result.stderr
    assert "nothing new: 12 known before" in result.stdout
    assert "larger-than-weight" not in {f["rule"] for f in verdict(place)["findings"]}
    assert call("report", "forensics", "--no-config").exit_code == 0


def test_pick_probe_and_report_read_the_same_file(place: Path) -> None:
    """Each takes what it has an option for."""
    written(place / "lora-forensics.toml", 'out = "there"\nwindow = 2\nno-plots = true\nignore = "warning"')
    assert call("pick", "runs").exit_code == 0
    assert (place / "there").is_dir()
    assert call("scan", "runs").exit_code == 0
    told = call("report", "there", "--json", "--report", "json")
    assert told.exit_code == 0
    assert json.loads(told.stdout)["runs"][0]["ignored"]
