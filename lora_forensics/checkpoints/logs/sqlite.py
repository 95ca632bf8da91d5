"""SQLite logs, as they lie: read only, with what is still in the write-ahead log, and without leaving a file."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from lora_forensics.checkpoints.history import Curve
from lora_forensics.checkpoints.logs import Log, unreadable
from lora_forensics.remote import local

_QUERY = "SELECT step, key, value_real FROM metrics WHERE value_real IS NOT NULL"


def sqlite_metrics(path: Path) -> Log:
    """The scalars in a table `metrics(step, key, value_real)`; empty if there is no such file."""
    if not path.is_file():
        return Log()
    try:
        rows = _read(path, lambda connection: connection.execute(_QUERY).fetchall())
    except (sqlite3.Error, OSError) as error:
        return Log(findings=(unreadable(str(path), f"cannot be read ({error})"),))
    points: dict[str, list[tuple[object, object]]] = {}
    for step, key, value in rows:
        points.setdefault(str(key), []).append((step, value))
    return Log({key: curve for key, values in points.items() if (curve := Curve.of(values)).steps})


def _read(path: Path, query: Callable[[sqlite3.Connection], list[tuple[object, ...]]]) -> list[tuple[object, ...]]:
    """Even a reader would write beside a database in WAL mode: it is opened as immutable, or a copy of both files."""
    wal = path.with_name(path.name + "-wal")
    if not (wal.is_file() and wal.stat().st_size):
        uri = local(path).resolve().as_uri() + "?mode=ro&immutable=1"
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            return query(connection)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        shutil.copyfile(local(path), copy)
        shutil.copyfile(local(wal), copy.with_name(wal.name))
        with closing(sqlite3.connect(copy)) as connection:
            return query(connection)
