"""Commands of this process on a real pseudo-terminal or in a pipe, and what is on the screen afterwards."""

from __future__ import annotations

import io
import os
import re
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lora_forensics.cli import main

termios, fcntl, pty = (pytest.importorskip(name) for name in ("termios", "fcntl", "pty"))

CODE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])")
VARIABLES = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "COLORTERM", "TERM", "PYTHONIOENCODING")
"""What decides on colour and width; tests start without them."""


@dataclass
class Shown:
    """What a command wrote, and how it ended."""

    code: int
    raw: bytes = b""
    """stdout, and on a terminal stderr too, as they came."""
    stderr: bytes = b""
    """Of a command in a pipe."""

    @property
    def lines(self) -> list[str]:
        """The screen when the command has ended: colours left out."""
        return screen(self.raw.decode())


@dataclass
class _Reader:
    """Takes what is written to a file, until nobody holds its other end."""

    handle: int
    taken: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while True:
            try:
                part = os.read(self.handle, 1 << 16)
            except OSError:  # Linux's word for the end of a pseudo-terminal
                break
            if not part:
                break
            self.taken.append(part)
        os.close(self.handle)

    def all(self) -> bytes:
        """Everything, when the other end is closed."""
        self._thread.join(30)
        return b"".join(self.taken)


def screen(text: str) -> list[str]:
    """Lines as they stand after all movements of the cursor; a code that is not known here is an error."""
    lines, row, place = [""], 0, 0
    while place < len(text):
        code = CODE.match(text, place)
        if code:
            parameter, letter = code.groups()
            if letter == "A":
                row -= int(parameter or 1)
            elif letter == "K":
                lines[row] = ""
            else:
                assert letter == "m" or parameter == "?25", f"a code that no command should write: {code.group()!r}"
            place = code.end()
            continue
        sign = text[place]
        if sign == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif sign != "\r":
            assert sign >= " ", f"a control character reached the terminal: {sign!r}"
            lines[row] += sign
        place += 1
    return lines[:-1] if lines[-1] == "" else lines


def window(handle: int, columns: int) -> None:
    """Give a pseudo-terminal its width."""
    fcntl.ioctl(handle, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))


def run(arguments: Sequence[str | Path], columns: int | None, encoding: str = "utf-8") -> Shown:
    """A command of this process: on a terminal of that many columns, or with stdout and stderr in pipes."""
    readers: list[_Reader] = []
    if columns is None:
        ends = [os.pipe(), os.pipe()]
        handles = [os.open(os.devnull, os.O_RDONLY), ends[0][1], ends[1][1]]
        readers = [_Reader(reader) for reader, _ in ends]
    else:
        terminal, end = pty.openpty()
        window(end, columns)
        handles = [end, os.dup(end), os.dup(end)]
        readers = [_Reader(terminal)]
    with _standing_in(handles, encoding):
        try:
            main.main([str(argument) for argument in arguments], prog_name="lora-forensics")
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
    taken = [reader.all() for reader in readers]
    return Shown(code, *taken)


@contextmanager
def _standing_in(handles: Sequence[int], encoding: str) -> Iterator[None]:
    """The three standard streams are these files."""
    before = sys.stdin, sys.stdout, sys.stderr
    for stream in before[1:]:
        stream.flush()
    kept = [os.dup(number) for number in range(3)]
    for number, handle in enumerate(handles):
        os.dup2(handle, number)
        os.close(handle)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.BufferedWriter(io.FileIO(number, "w", closefd=False)), encoding, line_buffering=True)
        for number in (1, 2)
    )
    streams = sys.stdout, sys.stderr
    try:
        yield
    finally:
        for stream in streams:
            if not stream.closed:
                stream.flush()
        sys.stdin, sys.stdout, sys.stderr = before
        for number, handle in enumerate(kept):
            os.dup2(handle, number)
            os.close(handle)
