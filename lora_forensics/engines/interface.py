"""Where units of work run, and what an engine is told."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, TypeVar

from lora_forensics.errors import LoraForensicsError

Item = TypeVar("Item")
Result = TypeVar("Result")
Advance = Callable[[float], None]
Work = Callable[[Item, Advance], Result]


def nothing(_: float) -> None:
    """Progress that nobody looks at."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an engine is told before it starts."""

    workers: int | None = None
    """How many units run at once; None lets the engine choose."""
    address: str | None = None
    """Of a Ray cluster."""
    device: str = "auto"
    """As `--device`: whether a GPU is wanted."""
    advance: Advance = nothing
    """Told of progress, in this process."""


class Engine(Protocol):
    """Runs functions over items; a context manager, which ends every worker that it started."""

    def __init__(self, settings: EngineSettings) -> None: ...

    @property
    def workers(self) -> int:
        """How many items run at once."""
        ...

    def map(
        self, function: Work[Item, Result], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result | LoraForensicsError]]:
        """Every item with its result, or with the error that concerns this item alone; in any order.

        Items are taken when a worker is free, and not before. Function, items and results can be pickled.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *reason: object) -> None: ...


Outcome = tuple[Literal["done", "error", "bug"], Any]
"""What a worker has to say of an item: its result, an error that a person can act on, or a traceback."""


def outcome(function: Work[Item, Result], item: Item, advance: Advance) -> Outcome:
    """Run a function in a worker; whatever happens can be pickled."""
    try:
        return "done", function(item, advance)
    except LoraForensicsError as error:
        return "error", error
    except Exception:  # noqa: BLE001 - raised again by `unpack`, where the caller is
        return "bug", traceback.format_exc()


def unpack(found: Outcome) -> Any:
    """The result or the error of an item.

    Raises:
        RuntimeError: a bug in the worker, with the worker's traceback as a note.
    """
    kind, value = found
    if kind == "bug":
        error = RuntimeError(f"in a worker: {value.strip().splitlines()[-1]}")
        error.add_note(value)
        raise error
    return value


def share_threads(workers: int) -> None:
    """Divide the cores among workers; to be called in a worker before torch or polars is imported."""
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"):
        os.environ.setdefault(name, threads)
