"""What the tests of engines let workers do; in a module of its own, which workers can import."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from lora_forensics.errors import BaseModelError

Advance = Callable[[float], None]


def square(number: int, advance: Advance) -> tuple[int, int]:
    """The square and who computed it; 3 cannot be had."""
    advance(1)
    if number == 3:
        raise BaseModelError("no 3", "take another")
    return number * number, os.getpid()


def meet(folder: str, advance: Advance) -> int:
    """Wait until two workers are here: only an engine that runs two at once gets past this."""
    (Path(folder) / str(os.getpid())).touch()
    for _ in range(1200):
        if len(list(Path(folder).iterdir())) > 1:
            return os.getpid()
        threading.Event().wait(0.1)
    return 0


def threads(number: int, advance: Advance) -> int:
    """How many threads torch takes in a worker."""
    import torch

    return torch.get_num_threads()


def die(item: tuple[int, str], advance: Advance) -> int:
    """Item 1 kills its worker: once if there is a place to remember that, else always."""
    number, memory = item
    if number == 1 and not (memory and Path(memory).exists()):
        if memory:
            Path(memory).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def fail(number: int, advance: Advance) -> int:
    """A bug."""
    return 1 // number
