"""One unit of work after the other, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from lora_forensics.engines.interface import Item, Result


class Serial:
    """The plain engine: torch uses all cores inside one unit of work."""

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield the results in order."""
        return map(function, items)
