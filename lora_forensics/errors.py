"""Errors of the package: one base with a message and a hint, few children by who must act.

This module imports nothing, so that every other module may raise from it.
"""


class LoraForensicsError(Exception):
    """Something a person can act on; `message` says what is wrong, `hint` what to try."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    exit_code = 2
    """Of a command that ends with it."""


class UsageError(LoraForensicsError):
    """The command or call was given something that it cannot use."""


class CheckpointError(LoraForensicsError):
    """A checkpoint file is damaged, or is not what its name says; `rule` is the id that triage calls it by."""

    def __init__(self, message: str, hint: str = "", rule: str = "unreadable-file") -> None:
        super().__init__(message, hint)
        self.rule = rule


class WeightlessError(CheckpointError):
    """An adapter that changes no weight, or no one weight: there is nothing to compare."""


class BaseModelError(LoraForensicsError):
    """The frozen weights are missing, or do not fit the adapter."""


class SeriesError(LoraForensicsError):
    """A stored table is missing, or does not hold what its schema says."""


class RemoteError(LoraForensicsError):
    """A server that holds files cannot be reached, or fails; nothing is wrong with the files."""


class WorkerError(LoraForensicsError):
    """A worker was lost with the work that it had: killed, out of memory, or its machine gone."""


class EvidenceError(LoraForensicsError):
    """What is known of a run is not enough for what was asked."""

    exit_code = 1


class UnfinishedError(LoraForensicsError):
    """A part of what was asked is done, and the rest could not be."""

    exit_code = 3


class ScoreError(LoraForensicsError):
    """A probe's scorer gave no score for one checkpoint; `hint` is what it wrote to stderr."""
