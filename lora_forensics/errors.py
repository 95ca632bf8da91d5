"""Errors of the package: one base with a message and a hint, few children by who must act.

This module imports nothing, so that every other module may raise from it.
"""


class LoraForensicsError(Exception):
    """Something a person can act on; `message` says what is wrong, `hint` what to try."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(LoraForensicsError):
    """The command or call was given something that it cannot use."""


class CheckpointError(LoraForensicsError):
    """A checkpoint file is damaged, or is not what its name says."""


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
