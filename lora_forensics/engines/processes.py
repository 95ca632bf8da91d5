"""Worker processes on this machine, one unit of work each at a time; a worker that dies takes one unit with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Self

from lora_forensics.engines.interface import EngineSettings, Item, Result, Work, outcome, share_threads, unpack
from lora_forensics.errors import LoraForensicsError, WorkerError

_SPAWN = multiprocessing.get_context("spawn")
"""A fork of a process with torch's threads may hang; spawned ones work everywhere."""
_SECONDS = 5
"""That a worker is given to end."""


@dataclass(frozen=True, slots=True, eq=False)
class _Worker:
    process: SpawnProcess
    pipe: Connection[Any, Any]

    @classmethod
    def start(cls, workers: int) -> _Worker:
        ours, theirs = _SPAWN.Pipe()
        process = _SPAWN.Process(target=_serve, args=(theirs, workers), daemon=True)
        process.start()
        theirs.close()  # so that its death ends the pipe
        return cls(process, ours)

    def give(self, function: Work[Any, Any], item: object) -> bool:
        """Whether it was alive to take it."""
        try:
            self.pipe.send((function, item))
        except OSError:
            return False
        return True

    def end(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join(_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def obituary(self) -> WorkerError:
        self.process.join(_SECONDS)
        code = self.process.exitcode
        how = f"ended by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        hint = "scan again to go on; if memory ran out, take fewer --workers or less --memory"
        return WorkerError(f"the worker process that measured it died ({how})", hint)


class Processes:
    """Spawned processes that share the cores; they start with the first item and end with the context."""

    def __init__(self, settings: EngineSettings) -> None:
        self.workers = settings.workers or os.cpu_count() or 1
        self._advance = settings.advance
        self._idle: list[_Worker] = []
        self._busy: dict[Connection[Any, Any], tuple[_Worker, Any]] = {}

    def map(
        self, function: Work[Item, Result], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result | LoraForensicsError]]:
        """Yield results as they come."""
        waiting = iter(items)
        more = True
        while more or self._busy:
            while more and len(self._busy) < self.workers:
                try:
                    self._give(function, next(waiting))
                except StopIteration:
                    more = False
            for pipe in wait(list(self._busy)) if self._busy else ():
                yield from self._hear(pipe)

    def _give(self, function: Work[Any, Any], item: object) -> None:
        worker = self._idle.pop() if self._idle else _Worker.start(self.workers)
        while not worker.give(function, item):
            worker.end()
            worker = _Worker.start(self.workers)
        self._busy[worker.pipe] = worker, item

    def _hear(self, pipe: Any) -> Iterator[tuple[Any, Any]]:
        worker, item = self._busy[pipe]
        try:
            kind, value = pipe.recv()
        except (EOFError, OSError):
            del self._busy[pipe]
            yield item, worker.obituary()
            worker.end()
            return
        if kind == "advance":
            self._advance(value)
            return
        del self._busy[pipe]
        self._idle.append(worker)
        yield item, unpack((kind, value))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        """End all workers, whatever they are at."""
        for worker in (*self._idle, *(worker for worker, _ in self._busy.values())):
            worker.end()
        self._idle.clear()
        self._busy.clear()


def _serve(pipe: Connection[Any, Any], workers: int) -> None:
    """A worker's life: items in, outcomes out, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; who started us ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    share_threads(workers)
    try:
        while True:
            function, item = pipe.recv()
            pipe.send(outcome(function, item, lambda count: pipe.send(("advance", count))))
    except (EOFError, OSError):
        return


def _end_with_parent() -> None:
    """A parent that was killed ends nothing: its workers must see it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
