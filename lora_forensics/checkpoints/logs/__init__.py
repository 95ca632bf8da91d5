"""Logs that trainers keep beside their checkpoints, each format in one module: to curves on the axis of steps.

A log is only an addition: what is damaged gives the part that can be read, and a finding, never an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_forensics.checkpoints.history import Curve
from lora_forensics.records import Finding

__all__ = ["Log", "unreadable"]


@dataclass(frozen=True, slots=True)
class Log:
    """What one log holds."""

    curves: Mapping[str, Curve] = field(default_factory=dict)
    """Name of a scalar, as the trainer logged it, to its values."""
    findings: tuple[Finding, ...] = ()
    """At most one: why it could not be read, or not to its end."""
    clocks: Mapping[str, Curve] = field(default_factory=dict)
    """Name of a scalar to the time at which it was logged, in seconds, where the log tells it."""

    def first(self, *names: str) -> Curve:
        """The first of these scalars that was logged; empty if none was."""
        return next((self.curves[name] for name in names if name in self.curves), Curve())


def unreadable(what: str, reason: str, hint: str = "") -> Finding:
    """The finding for a log that could not be read as a whole."""
    return Finding("log-unreadable", "info", f"{what}: {reason}", hint)
