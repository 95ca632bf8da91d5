"""A command of the person's own: its last line is a number, or a JSON list with one number for each sample."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

from lora_forensics.errors import ScoreError, UsageError
from lora_forensics.probe.interface import ProbeOptions, ScorerSettings
from lora_forensics.records import Checkpoint

PLACE = "{checkpoint}"
_TOLD = 5
"""Last lines of stderr that are told when a command fails."""
_TAIL = 1 << 22
"""Bytes at the end of an output that are looked at."""
_GRACE = 2.0
"""Seconds between asking a process to end and killing it."""


class CommandScorer:
    """Runs a command for each checkpoint, in a process group of its own so that all of it can be ended."""

    name: ClassVar[str] = "command"
    parallel: ClassVar[bool] = True

    @classmethod
    def wanted(cls, options: ProbeOptions) -> bool:
        """A command was given."""
        return options.score is not None

    def __init__(self, settings: ScorerSettings) -> None:
        """Cut the command into words.

        Raises:
            UsageError: it is no command, or has no place for the checkpoint.
        """
        self._command = settings.options.score or ""
        self._timeout = settings.options.timeout
        try:
            self._words = shlex.split(self._command)
        except ValueError as error:
            raise UsageError(f"--score {self._command!r} cannot be read: {error}", "check its quotes") from error
        if not any(PLACE in word for word in self._words):
            hint = f"write {PLACE} where its path belongs: --score 'python score.py {PLACE}'"
            raise UsageError(f"--score {self._command!r} does not say where the checkpoint goes", hint)
        if PLACE not in self._words[0] and shutil.which(self._words[0]) is None:
            raise UsageError(f"--score: no program is called {self._words[0]!r}", "give its path")
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    @property
    def identity(self) -> str:
        """The command, and the files that it names as they are now."""
        files = [_mark(Path(word)) for part in self._words[1:] for word in (part, part.rpartition("=")[2])]
        return hashlib.sha256("\0".join([self.name, self._command, *files]).encode()).hexdigest()[:16]

    @property
    def what(self) -> str:
        """The command."""
        return self._command

    def score(self, checkpoint: Checkpoint) -> Sequence[float]:
        """What the command prints last.

        Raises:
            ScoreError: it fails, takes too long, or prints no number.
        """
        # each word is filled by itself and no shell reads it: spaces and quotes in a path stay what they are
        path = str(checkpoint.path)
        path = f".{os.sep}{path}" if path.startswith("-") else path  # else it is read as an option
        words = [word.replace(PLACE, path) for word in self._words]
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            code = self._run(words, out, err)
            if code is None:
                raise ScoreError(f"took longer than {self._timeout:g} seconds", _told(err))
            if code:
                how = f"ended with code {code}" if code > 0 else f"was killed by signal {-code}"
                raise ScoreError(how, _told(err))
            return _number(out, err)

    def stop(self) -> None:
        """End all that runs."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for process in running:
            _end(process)

    def _run(self, words: list[str], out: IO[bytes], err: IO[bytes]) -> int | None:
        """The exit code; None where time ran out."""
        try:
            with self._lock:
                if self._stopped:
                    raise ScoreError("stopped")
                process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=err, **_own_group())  # noqa: S603 - the person's own command
                self._running.add(process)
        except (OSError, ValueError) as error:
            raise ScoreError(f"cannot be run: {error}") from error
        try:
            return process.wait(self._timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)  # what it left behind, too
            self._running.discard(process)


def _own_group() -> dict[str, Any]:
    if os.name == "nt":
        return {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    return {"start_new_session": True}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and everything that it started, kindly first."""
    if os.name == "nt":
        if process.poll() is None:
            tree = ["taskkill", "/F", "/T", "/PID", str(process.pid)]
            subprocess.run(tree, capture_output=True, check=False)  # noqa: S603 - Windows' own program
            process.wait()
        return
    if process.poll() is None:
        _signal(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)  # its session's first process: the group has its number


def _number(out: IO[bytes], err: IO[bytes]) -> Sequence[float]:
    """The last line as a number or a list of numbers."""
    lines = [line.strip() for line in _tail(out).splitlines() if line.strip()]
    if not lines:
        raise ScoreError("printed nothing", _told(err))
    try:
        found = json.loads(lines[-1]) if lines[-1].startswith("[") else float(lines[-1].replace("_", "?"))
    except (ValueError, RecursionError):
        raise ScoreError(f"its last line is no number: {lines[-1][:80]!r}", _told(err)) from None
    values = found if isinstance(found, list) else [found]
    if not values or any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in values):
        raise ScoreError(f"its last line is no list of numbers: {lines[-1][:80]!r}", _told(err))
    try:
        numbers = tuple(map(float, values))
    except OverflowError:
        numbers = (math.inf,)
    if not all(map(math.isfinite, numbers)):
        raise ScoreError(f"its number is not finite: {lines[-1][:80]}", _told(err))
    return numbers


def _told(err: IO[bytes]) -> str:
    lines = [line.rstrip() for line in _tail(err).splitlines() if line.strip()]
    return "\n".join(lines[-_TOLD:])


def _tail(file: IO[bytes]) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL))
    return file.read().decode("utf-8", "replace")


def _mark(path: Path) -> str:
    """Size and time of a file that a command names; a script that was changed is another scorer."""
    try:
        return f"{path}|{path.stat().st_size}|{path.stat().st_mtime_ns}" if path.is_file() else ""
    except (OSError, ValueError):
        return ""
