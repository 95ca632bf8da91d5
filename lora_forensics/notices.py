"""What measuring notices besides numbers, collected over units of work and told as findings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lora_forensics.records import Finding

MEASURING_RULES = frozenset(
    {
        "base-hash-differs", "base-missing", "module-unresolved", "module-unread", "full-weights", "scale-unknown",
        "svd-initialised",
    }
)  # fmt: skip
"""Rules of findings that come from measuring: kept when rows are reused."""

_SVD_INITIALISED = ("pissa", "olora", "corda", "loftq", "eva", "mica")
_LISTED = 5
"""Names that a message lists before it says how many more there are."""


@dataclass(slots=True)
class Notices:
    """Names of modules and tensors, and why they are worth a word; in the order in which they were met."""

    unresolved: dict[str, str] = field(default_factory=dict)
    """Modules without a base weight, and why."""
    unread: dict[str, str] = field(default_factory=dict)
    """Modules of a kind that is not read, and why."""
    full_weights: dict[str, None] = field(default_factory=dict)
    """Tensors saved beside the adapter that are whole weights."""
    scale_unknown: dict[str, None] = field(default_factory=dict)
    """Modules whose scale no file tells."""
    initialisations: dict[str, None] = field(default_factory=dict)
    """Initialisations of which the configuration speaks."""

    def add(self, other: Notices) -> None:
        """Take in what another unit of work noticed."""
        self.unresolved.update(other.unresolved)
        self.unread.update(other.unread)
        self.full_weights.update(other.full_weights)
        self.scale_unknown.update(other.scale_unknown)
        self.initialisations.update(other.initialisations)

    def findings(self) -> list[Finding]:
        """One finding for each sort of notice."""
        found = []
        if self.unresolved:
            message = f"{_many(self.unresolved)} no weight in the base model and no cosine: {some(self.unresolved)}"
            found.append(Finding("module-unresolved", "warning", message, next(iter(self.unresolved.values()))))
        if self.unread:
            message = f"{_many(self.unread)} tensors of a kind that is not read, left out: {some(self.unread)}"
            found.append(Finding("module-unread", "warning", message, next(iter(self.unread.values()))))
        if self.full_weights:
            message = f"full weights saved beside the adapter are not compared: {some(self.full_weights)}"
            found.append(Finding("full-weights", "info", message, "modules_to_save train a weight as a whole"))
        if self.scale_unknown:
            message = f"no file tells the scale (alpha) of {len(self.scale_unknown)} modules: their norms assume 1"
            hint = "cosines do not depend on it; keep adapter_config.json beside the weights"
            found.append(Finding("scale-unknown", "warning", message, hint))
        svd = [name for name in self.initialisations if name.startswith(_SVD_INITIALISED)]
        if svd:
            message = f"the adapter starts from {', '.join(svd)}: B @ A is not the change of the stock base weight"
            hint = "read the cosines with care: the turning point of the method is not defined for it"
            found.append(Finding("svd-initialised", "warning", message, hint))
        return found


def _many(names: Iterable[str]) -> str:
    number = len(list(names))
    return f"{number} module has" if number == 1 else f"{number} modules have"


def some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more
