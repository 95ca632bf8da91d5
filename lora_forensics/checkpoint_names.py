"""Checkpoints by the names that people give them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lora_forensics.errors import UsageError
from lora_forensics.records import Checkpoint

_SPELLINGS: tuple[Callable[[Checkpoint], str], ...] = (
    lambda checkpoint: checkpoint.name,
    lambda checkpoint: checkpoint.name.rpartition("/")[0],
    lambda checkpoint: Path(checkpoint.name).stem,
    lambda checkpoint: str(checkpoint.step),
)


def named(checkpoints: Sequence[Checkpoint], wanted: str) -> list[Checkpoint]:
    """The checkpoints that a person means by a name: the file, the folder that it lies in, or the step.

    Raises:
        UsageError: there is none.
    """
    wanted = wanted.strip().removesuffix("/")
    for spelling in _SPELLINGS:
        if found := [checkpoint for checkpoint in checkpoints if spelling(checkpoint) == wanted]:
            return found
    some = ", ".join(checkpoint.name for checkpoint in checkpoints[:3])
    raise UsageError(f"no checkpoint of this run is called {wanted!r}", f"write it as {some}, ... or give its step")
