"""TensorBoard event files: their scalars, through the messages of the `tensorboard` library.

Its own file loader is not used: it checks sums byte by byte in Python, and reads images as if they were wanted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lora_forensics.checkpoints.history import Curve
from lora_forensics.checkpoints.logs import Log, unreadable
from lora_forensics.records import Finding
from lora_forensics.remote import scanned

_EVENTS = "events.out.tfevents."
_LARGEST = 1 << 16
"""Bytes of a record that can hold scalars; images and histograms are larger and are passed over."""
_MISSING = "the library tensorboard is not installed; learning rates and losses in them are not read"


def event_files(folder: Path) -> list[Path]:
    """The event files that lie directly in a folder, oldest first; none if it cannot be read."""
    try:
        with scanned(folder) as entries:
            found = [entry.name for entry in entries if entry.name.startswith(_EVENTS) and entry.is_file()]
    except OSError:
        return []
    return [folder / name for name in sorted(found)]


def started(file: Path) -> float | None:
    """Seconds since 1970 at which a log was begun, by its name."""
    stamp = file.name.removeprefix(_EVENTS).partition(".")[0]
    return float(stamp) if stamp.isascii() and stamp.isdigit() and len(stamp) < 16 else None


def tensorboard_scalars(folder: Path) -> Log:
    """All scalars in the event files of one folder; of a step that was logged again after a restart the last value.

    Empty, without the library and without a finding, where there are no event files.
    """
    files = event_files(folder)
    if not files:
        return Log()
    try:
        from google.protobuf.message import DecodeError
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError:
        return Log(findings=(unreadable(f"TensorBoard logs in {folder}", _MISSING, "install lora-forensics[logs]"),))
    points: dict[str, list[tuple[int, object]]] = {}
    clocks: dict[str, list[tuple[int, object]]] = {}
    findings: list[Finding] = []
    for file in files:
        try:
            for record in _records(file):
                event = Event.FromString(record)
                for value in event.summary.value:
                    if value.HasField("simple_value"):
                        number = value.simple_value
                    elif value.HasField("tensor"):  # how TensorFlow 2, and torch's `new_style`, write a scalar
                        array = make_ndarray(value.tensor)
                        number = array.item() if array.size == 1 else None
                    else:
                        continue
                    points.setdefault(value.tag, []).append((event.step, number))
                    clocks.setdefault(value.tag, []).append((event.step, event.wall_time))
        except (OSError, EOFError, ValueError, TypeError, DecodeError) as error:
            findings.append(unreadable(str(file), f"a damaged TensorBoard log, read as far as it goes ({error})"))
    curves = {tag: curve for tag, values in points.items() if (curve := Curve.of(values)).steps}
    return Log(curves, tuple(findings[:1]), {tag: Curve.of(clocks[tag]) for tag in curves})


def _records(file: Path) -> Iterator[bytes]:
    """The payloads of a record file (length, its sum, payload, its sum); the last may be cut off while it is written.

    Raises:
        EOFError: the file goes on, but not with a record.
    """
    left = file.stat().st_size
    with file.open("rb") as stream:
        while left >= 16:
            length = int.from_bytes(stream.read(12)[:8], "little")
            left -= 16 + length
            if left < 0:
                if length >= _LARGEST:
                    raise EOFError("a record is longer than the file")
                return
            if length < _LARGEST:
                yield stream.read(length)
                stream.seek(4, os.SEEK_CUR)
            else:
                stream.seek(length + 4, os.SEEK_CUR)
