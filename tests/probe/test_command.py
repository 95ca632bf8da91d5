"""A command as scorer: what it may print, and every way in which it can go wrong."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path

import pytest

from lora_forensics.errors import ScoreError, UsageError
from lora_forensics.probe.command import CommandScorer
from lora_forensics.probe.interface import ProbeOptions, ScorerSettings
from lora_forensics.records import Checkpoint, Run

POSIX = pytest.mark.skipif(os.name == "nt", reason="needs POSIX processes")


def scorer(command: str, timeout: float | None = None) -> CommandScorer:
    """A scorer for this command."""
    return CommandScorer(ScorerSettings(ProbeOptions(score=command, timeout=timeout), Run("r", Path(), "peft", ()), ()))


def python(code: str) -> str:
    """A command that runs a line of Python with the checkpoint as its argument."""
    return f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {{checkpoint}}"


def checkpoint(path: Path | str = "x.safetensors") -> Checkpoint:
    """A checkpoint at a path."""
    return Checkpoint(Path(path), "x", 10)


@pytest.mark.parametrize(
    ("printed", "score"),
    [
        ("1.5", [1.5]),
        ("loading\\n\\n  -3e-2  \\n\\n", [-0.03]),
        ("[1, 2.5, 3]", [1.0, 2.5, 3.0]),
        ("7", [7.0]),
    ],
)
def test_the_last_line_is_a_number_or_a_list(printed: str, score: list[float]) -> None:
    """Whatever stands before it, and empty lines behind it, do not count."""
    assert list(scorer(python(f"print('''{printed}''')")).score(checkpoint())) == score


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("pass", "printed nothing"),
        ("print('loss: 3')", "no number: 'loss: 3'"),
        ("print('nan')", "not finite"),
        ("print('inf')", "not finite"),
        ("print('[1, NaN]')", "not finite"),
        ("print('[]')", "no list of numbers"),
        ("print('[1, \"2\"]')", "no list of numbers"),
        ("print('[true]')", "no list of numbers"),
        ("print('[' * 100_000)", "no number"),
        ("print('[1, 2')", "no number"),
        ("print('1_0')", "no number"),
        ("import sys; print(1); sys.exit(3)", "ended with code 3"),
        ("raise ValueError('my fault')", "ended with code 1"),
        ("import sys; sys.stdout.buffer.write(b'\\xff\\xfe')", "no number"),
    ],
)
def test_what_is_no_score_says_why(code: str, said: str) -> None:
    """Codes, nonsense, NaN, nothing: a reason each."""
    with pytest.raises(ScoreError) as caught:
        scorer(python(code)).score(checkpoint())
    assert said in caught.value.message


def test_the_last_lines_of_stderr_are_told() -> None:
    """Few of them, and the last."""
    code = "import sys; [print(n, file=sys.stderr) for n in range(100)]; sys.exit(1)"
    with pytest.raises(ScoreError) as caught:
        scorer(python(code)).score(checkpoint())
    assert caught.value.hint.splitlines() == ["95", "96", "97", "98", "99"]


def test_a_path_stays_one_word_whatever_is_in_it(tmp_path: Path) -> None:
    """Spaces, quotes, dollar signs and semicolons reach the command as they are, and no shell sees them."""
    name = "a b'c$(touch bad); `x` & {y}.safetensors" if os.name != "nt" else "a b'c$x; {y}.safetensors"
    path = tmp_path / name
    path.write_text("12345")
    code = "import sys, os; assert len(sys.argv) == 2; print(os.path.getsize(sys.argv[1]))"
    assert list(scorer(python(code)).score(checkpoint(path))) == [5.0]
    inside = f"{shlex.quote(sys.executable)} -c 'import sys; print(len(sys.argv[1]))' --at={{checkpoint}}"
    assert list(scorer(inside).score(checkpoint(path))) == [len(f"--at={path}")]


def test_a_long_list_is_read_whole() -> None:
    """One number for each of many samples makes a line of many bytes."""
    assert list(scorer(python("print([0.1234567890123456] * 9000)")).score(checkpoint())) == [0.1234567890123456] * 9000


def test_a_path_is_no_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's folder may be called as options are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-n").mkdir()
    code = "import sys, pathlib; print(float(pathlib.Path(sys.argv[1]).is_file() and sys.argv[1][0] != '-'))"
    file = Path("-n") / "x.safetensors"
    file.touch()
    assert list(scorer(python(code)).score(checkpoint(file))) == [1.0]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("python score.py", "does not say where the checkpoint goes"),
        ("", "does not say where"),
        ("echo 'open {checkpoint}", "cannot be read"),
        ("no-such-program-anywhere {checkpoint}", "no program is called"),
    ],
)
def test_a_command_that_cannot_work_is_refused_at_once(command: str, said: str) -> None:
    """Before anything is measured."""
    with pytest.raises(UsageError, match=said):
        scorer(command)


@POSIX
def test_a_command_that_hangs_is_ended_with_all_its_children(tmp_path: Path) -> None:
    """The time limit reaches grandchildren, also those that ignore being asked."""
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    code = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid))\n"
        "print(1, flush=True); time.sleep(600)"
    )
    with pytest.raises(ScoreError, match="took longer than 2 seconds"):
        scorer(python(code), timeout=2).score(checkpoint())
    assert gone(int((tmp_path / "pid").read_text()))


@POSIX
def test_what_a_command_leaves_behind_is_ended(tmp_path: Path) -> None:
    """A command that ends well and leaves a child in the background."""
    code = (
        "import subprocess, sys\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); print(4)"
    )
    assert list(scorer(python(code)).score(checkpoint())) == [4.0]
    assert gone(int((tmp_path / "pid").read_text()))


def gone(pid: int) -> bool:
    """Whether a process ends soon; one that has ended and is not collected yet counts as ended."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        status = Path(f"/proc/{pid}/stat")
        if status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_a_script_that_was_changed_is_another_scorer(tmp_path: Path) -> None:
    """The identity covers the command and the files that it names, also behind an equals sign."""
    script = tmp_path / "score.py"
    script.write_text("print(1)")
    command = f"{shlex.quote(sys.executable)} {script.as_posix()} {{checkpoint}}"
    first = scorer(command).identity
    assert scorer(command).identity == first
    assert scorer(f"{command} --x").identity != first
    script.write_text("print(22)")
    assert scorer(command).identity != first
    option = f"{shlex.quote(sys.executable)} --by={script.as_posix()} {{checkpoint}}"
    second = scorer(option).identity
    script.write_text("print(333)")
    assert scorer(option).identity != second
