"""One unit of work after the other, in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Self

from lora_forensics.engines.interface import EngineSettings, Item, Result, Work
from lora_forensics.errors import LoraForensicsError


class Serial:
    """The plain engine: torch uses all cores inside one unit of work."""

    def __init__(self, settings: EngineSettings) -> None:
        self.workers = 1
        self._advance = settings.advance

    def map(
        self, function: Work[Item, Result], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result | LoraForensicsError]]:
        """Yield the results in order."""
        for item in items:
            try:
                yield item, function(item, self._advance)
            except LoraForensicsError as error:
                yield item, error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        """There is nothing to end."""
