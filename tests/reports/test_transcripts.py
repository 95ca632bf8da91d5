"""What commands show on terminals of 80 and 200 columns and in a pipe, and what no command may send to either.

Golden transcripts lie in golden/transcripts, a file a command; LORA_FORENSICS_REGENERATE=1 writes them anew.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from cli_runs import peft_run, project
from safetensors.torch import save_file

terminals = pytest.importorskip("terminals", reason="needs pseudo-terminals", exc_type=ImportError)

GOLDEN = Path(__file__).parent / "golden" / "transcripts"
REPOSITORY = Path(__file__).parents[2]
HEAD = 24
"""Lines of a page of reference that a golden file holds; more would change with every new rule or format."""

KEPT, MOVED = "runs/kept", "runs/moved"
SCAN = "scan runs --out out --no-plots"
COMMANDS = {
    "scan": SCAN,
    "scan_verbose": f"scan {MOVED} --out one --no-plots -v",
    "runs": "runs runs",
    "pick": f"pick {MOVED} --out out",
    "pick_none": "pick runs/few --out out",
    "inspect": f"inspect {MOVED}/checkpoint-50",
    "inspect_verbose": f"inspect {MOVED}/checkpoint-50 -v",
    "inspect_two": f"inspect {MOVED}/checkpoint-50 {MOVED}/checkpoint-60",
    "inspect_keys": f"inspect {MOVED}/checkpoint-50 --keys",
    "inspect_metadata": f"inspect {MOVED}/checkpoint-50 --metadata",
    "compare": "compare out",
    "average": f"average {MOVED} --out out --output mean --force",
    "prune": f"prune {MOVED} --out out --min-age 0",
    "probe": "probe runs/scored --out scored --score score",
    "table": "table out runs --columns run,keep,status",
    "rules": "rules",
    "rule": "rules nonfinite",
    "formats": "formats",
    "metrics": "metrics",
    "report": "report few --report markdown",
    "check": f"check {KEPT}/checkpoint-70/adapter_model.safetensors {MOVED}/checkpoint-50/adapter_model.safetensors",
    "nothing": "scan nothing",
}
"""Name of the golden file to the command, in a folder with runs."""
COLOURED = {"scan", "scan_verbose", "inspect", "inspect_verbose", "inspect_two", "compare", "probe", "report"}
REFERENCE = {"rules", "formats", "metrics"}
DATA = {"pick", "table", "inspect_keys", "inspect_metadata"}
"""What other programs read, or a person copies: lines are as long as what they hold."""
SCORE = """d=$(dirname "$1"); echo $((${d##*-} - 40)) | tr -d -"""
"""How far a checkpoint's step is from 40."""
ROUNDING = re.compile(r"(relative error|largest) \S+(?=[;:])")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with a held-out loss, without, and too short, two of them with damage; scanned and probed. Read only."""
    base = tmp_path_factory.mktemp("transcripts")
    folder = base / ("p" * (150 - len(str(base))))  # equally long everywhere: the width of paths shows
    project(folder / "runs", ["kept"], losses=[abs(place - 4) + 1.0 for place in range(12)])
    project(folder / "runs", ["moved"])
    project(folder / "runs", ["scored"], count=9)
    peft_run(folder / "runs" / "few", 3, base="../base.safetensors")
    cut = folder / KEPT / "checkpoint-70" / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:300])
    (folder / MOVED / "checkpoint-30" / "adapter_model.safetensors").write_bytes(b"")
    (folder / "score.sh").write_text(SCORE)
    with chdir(folder):
        for command in (SCAN, "scan runs/few --out few --no-plots", COMMANDS["probe"], COMMANDS["scan_verbose"]):
            terminals.run(words(command), None)
    return folder


def words(command: str) -> list[str]:
    """Arguments of a command of the table."""
    return ["sh score.sh {checkpoint}" if word == "score" else word for word in command.split()]


@pytest.fixture(autouse=True)
def _bare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder with the runs, on an ordinary terminal of which the environment says nothing more."""
    for name in terminals.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.chdir(folder)


@pytest.mark.parametrize("name", COMMANDS)
class TestCommands:
    """All of the table."""

    def test_golden(self, name: str, folder: Path) -> None:
        """What is shown is what was looked at; colours are on the terminal only, and in a pipe nothing is wider."""
        arguments = words(COMMANDS[name])
        pages = {f"{columns} columns": terminals.run(arguments, columns) for columns in (80, 200)}
        piped = terminals.run(arguments, None)
        assert {shown.code for shown in pages.values()} == {piped.code}
        assert b"\x1b" not in piped.raw + piped.stderr
        assert name not in COLOURED or all(b"\x1b[" in shown.raw for shown in pages.values())
        texts = {title: shown.lines for title, shown in pages.items()}
        texts["in a pipe"] = (piped.raw + piped.stderr).decode().splitlines()
        parts = [f"exit code {piped.code}\n"]
        for title, lines in texts.items():
            head = [*lines[:HEAD], "..."] if name in REFERENCE and len(lines) > HEAD else lines
            if title != "80 columns" and lines == texts["80 columns"]:
                head = ["as at 80 columns"]
            parts.append("\n".join([f"--- {title}", *head]).replace(str(folder), "/work") + "\n")
        _compare(GOLDEN / f"{name}.txt", ROUNDING.sub(r"\1 E", "".join(parts)))

    @pytest.mark.parametrize("columns", [40, 80, 200])
    def test_width(self, name: str, columns: int) -> None:
        """No line is wider than the terminal, unless it is one word."""
        if name not in DATA:
            assert not too_wide(terminals.run(words(COMMANDS[name]), columns).lines, columns)

    def test_no_color(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """NO_COLOR on a terminal: the same words, and nothing but words."""
        coloured = terminals.run(words(COMMANDS[name]), 80)
        monkeypatch.setenv("NO_COLOR", "1")
        shown = terminals.run(words(COMMANDS[name]), 80)
        assert shown.lines == coloured.lines
        assert not re.search(rb"\x1b\[[\d;]*m", shown.raw)

    def test_dumb(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A terminal that knows no codes gets none, not even for the progress display."""
        monkeypatch.setenv("TERM", "dumb")
        assert b"\x1b" not in terminals.run(words(COMMANDS[name]), 80).raw

    def test_force_color(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """FORCE_COLOR in a pipe: colours, and no movement of the cursor; NO_COLOR beside it wins."""
        monkeypatch.setenv("FORCE_COLOR", "1")
        piped = terminals.run(words(COMMANDS[name]), None)
        codes = {letter for _, letter in terminals.CODE.findall((piped.raw + piped.stderr).decode())}
        assert codes == ({"m"} if name in COLOURED else set())
        monkeypatch.setenv("NO_COLOR", "1")
        assert b"\x1b" not in terminals.run(words(COMMANDS[name]), None).raw


def too_wide(lines: list[str], columns: int) -> list[str]:
    """Lines of more cells than columns that could have been broken; a mark may stand before a tensor or URL."""
    bare = [re.sub(r"^    -> |^  source  (?=http)", "", line) for line in lines]
    return [line for line in bare if cells(line) > columns and len(line.split()) > 1]


def cells(line: str) -> int:
    """Cells of a line, by Unicode's own table: wide signs take two, marks none."""
    return sum(0 if unicodedata.combining(sign) else 1 + (unicodedata.east_asian_width(sign) in "WF") for sign in line)


def test_names_of_all_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide signs, emoji, signs that join and words without spaces: lines fit, also those of the progress display."""
    monkeypatch.chdir(tmp_path)
    name = "学習した層の記録🙂👩‍🎨:smile:" + "é" * 30
    project(tmp_path / "runs", [name, f"{name}2"], count=3)
    for columns in (40, 80):
        for command in (f"{SCAN} -v --rescan", "runs runs -v", "compare out", f"inspect runs/{name}/checkpoint-10 -v"):
            shown = terminals.run(command.split(), columns)
            assert shown.code == 0, shown.raw.decode()
            assert "学習した" in shown.raw.decode()
            assert not too_wide(shown.lines, columns), command
            bare = terminals.CODE.sub("", shown.raw.decode()) if "--rescan" in command else ""
            assert not too_wide(re.split(r"[\r\n]+", bare), columns)


def test_text_of_files_is_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes, marks of direction and ends of lines in names of tensors and in metadata, on a real terminal."""
    monkeypatch.chdir(tmp_path)
    evil = "a\x1b[2J\x1b]0;title\x07\u202e\x9b31m\r\nb\u2066\x00"
    module = "".join(sign for sign in evil if sign not in ".\r\n")
    tensors = {f"lora_unet_{module}.lora_{side}.weight": torch.ones(2, 2) for side in ("up", "down")}
    save_file(tensors, "x.safetensors", {evil: evil, "ss_output_name": evil, "ss_tag_frequency": json.dumps({evil: 1})})
    for option in ("", "-v", "--keys", "--metadata", "x.safetensors"):
        shown = terminals.run(f"inspect x.safetensors {option}".split(), 80)
        assert shown.code == 0, shown.raw
        letters = set("".join(shown.lines))  # `lines` refuses control characters and codes that move more than a bar
        assert not letters & set("\x9b\u202e\u2066\x00")
    assert terminals.run(["check", "x.safetensors", evil.replace("\0", "")], 80).lines


def test_pick_prints_what_a_shell_can_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pipe the path's own bytes; on a terminal, with what no terminal should be sent, quoted for a shell."""
    monkeypatch.chdir(tmp_path)
    raw = b"it's \\ a\x1b[31m\xe2\x80\xae\xe5\xb1\xa4\n" + (b"\xff" if sys.platform == "linux" else b"")
    folder = Path(os.fsdecode(raw))
    project(folder, losses=[3.0, 1.0, 2.0], count=3)
    expected = os.path.join(raw, b"run", b"checkpoint-20", b"adapter_model.safetensors")
    command = ["pick", folder / "run", "--out", "out"]
    for encoding in ("utf-8", "ascii"):
        assert terminals.run(command, None, encoding).raw == expected + b"\n"
    (line,) = terminals.run(command, 80).lines
    assert line.isprintable()
    assert line.startswith("$'")
    assert "層" in line
    if bash := shutil.which("bash"):
        spelt = subprocess.run([bash, "-c", f"printf %s {line}"], capture_output=True, check=True)
        assert spelt.stdout == expected


def test_a_console_that_spells_ascii_only(tmp_path: Path) -> None:
    """No UTF-8 in the locale, the streams or the names of files: escapes instead, and never a crash."""
    name = "層🙂é"
    project(tmp_path / "runs", [name], count=3, losses=[3.0, 1.0, 2.0])
    commands = [
        ["scan", "runs", "--out", "out", "--no-plots", "-v"], ["runs", "runs", "-v"], ["pick", f"runs/{name}"],
        ["report", "out"], ["inspect", f"runs/{name}/checkpoint-20"], ["scan", f"{name}!"],
        ["scan", "runs", "--out", "out", "--no-plots", "--json"],
    ]  # fmt: skip
    script = (
        "import sys\nfrom lora_forensics.cli import main\ncodes = []\n"
        f"for arguments in {commands!a}:\n"
        "    try: main.main([word.encode().decode('ascii', 'surrogateescape') for word in arguments])\n"
        "    except SystemExit as ended: codes.append(ended.code)\n"
        "sys.exit(str(codes))\n"
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = shell([sys.executable, "-c", script], tmp_path, **plain)
    assert done.stderr.splitlines()[-1] == b"[0, 0, 0, 0, 0, 2, 0]", done.stderr.decode()
    assert (done.stdout + done.stderr).isascii() or os.fsencode(f"runs/{name}/checkpoint-20") in done.stdout
    assert b"Traceback" not in done.stderr


def test_a_reader_that_has_gone_is_no_error(folder: Path) -> None:
    """As of `| head -1`: it ends with 0, and says nothing."""
    reader, writer = os.pipe()
    os.close(reader)
    done = shell([sys.executable, "-m", "lora_forensics", "rules"], folder, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_interrupt_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    """Ctrl-C while the bar moves: the cursor is shown again, the bar is gone, one message, no traceback."""
    project(tmp_path / "runs", count=60)
    terminal, end = terminals.pty.openpty()
    terminals.window(end, 80)
    command = [sys.executable, "-m", "lora_forensics", "scan", "runs", "--out", "out", "--engine", "processes"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdin=end, stdout=end, stderr=end, start_new_session=True
    )
    os.close(end)
    raw = b""
    until = time.monotonic() + 120
    while time.monotonic() < until and select.select([terminal], [], [], 120)[0]:
        try:
            part = os.read(terminal, 4096)
        except OSError:
            break
        if not part:
            break
        if b"?25l" in raw + part and b"?25l" not in raw:
            os.killpg(process.pid, signal.SIGINT)
        raw += part
    os.close(terminal)
    assert process.wait(60) == 130, raw.decode()
    assert raw.rindex(b"\x1b[?25h") > raw.rindex(b"\x1b[?25l")
    lines = list(filter(None, terminals.screen(raw.decode())))
    assert lines[0].startswith("lora-forensics: stopped;"), lines
    assert len(lines) <= 3


def environment(**settings: str) -> dict[str, str]:
    """Of a process that finds the package, on an ordinary terminal."""
    known = {name: value for name, value in os.environ.items() if name not in terminals.VARIABLES}
    return {**known, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm-256color", **settings}


def shell(
    command: list[str], folder: Path, stdout: int = subprocess.PIPE, **settings: str
) -> subprocess.CompletedProcess[bytes]:
    """A command in a process of its own."""
    return subprocess.run(
        command, cwd=folder, env=environment(**settings), stdout=stdout, stderr=subprocess.PIPE, check=False
    )


def _compare(path: Path, text: str) -> None:
    if os.environ.get("LORA_FORENSICS_REGENERATE"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8", newline="\n")
    assert path.read_text("utf-8") == text, f"if {path.name} should change: LORA_FORENSICS_REGENERATE=1, then read it"
