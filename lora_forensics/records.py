"""Values that travel between stages: frozen, small, and free of torch and polars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from lora_forensics.errors import LoraForensicsError, SeriesError
from lora_forensics.remote import place
from lora_forensics.rules import Severity, anchor

SCHEMA = 1
"""Version of verdict.json, summary.json and the Parquet files."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing worth knowing about a run."""

    rule: str
    """Stable id, for `--fail-on` and `--ignore`."""
    severity: Severity
    message: str
    """What was seen, in one sentence."""
    hint: str = ""
    """What to do about it; may be empty."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready form, with the page and heading where the rule is documented."""
        return {**asdict(self), "docs": anchor(self.rule)}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Finding:
        """The inverse of `to_dict`."""
        return cls(**{key: value for key, value in document.items() if key != "docs"})


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file or folder that was looked at and left out."""

    path: Path
    reason: str
    expected: bool = False
    """Nothing is wrong with it, it is no checkpoint: an optimizer's state, a base model. `--strict` lets it pass."""
    rule: str = ""
    """The rule that says what is wrong with it."""

    @classmethod
    def because(cls, path: Path, error: LoraForensicsError) -> Skipped:
        """With the error's message as the reason, less the path that it starts with."""
        return cls(path, error.message.removeprefix(f"{path}: "), rule=getattr(error, "rule", ""))

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready form."""
        return {"path": self.path.as_posix(), "reason": self.reason, "expected": self.expected, "rule": self.rule}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Skipped:
        """The inverse of `to_dict`."""
        return cls(
            place(document["path"]), document["reason"], document.get("expected", False), document.get("rule", "")
        )


def describe_adapter(kinds: Sequence[str], ranks: Sequence[int]) -> str:
    """'lora rank 8', 'lora ranks 4-16'; both ascend, ranks may be unknown."""
    rank = f" rank {ranks[0]}" if len(ranks) == 1 else f" ranks {ranks[0]}-{ranks[-1]}" if ranks else ""
    return ", ".join(kinds) + rank


@dataclass(frozen=True, slots=True)
class BaseReference:
    """What a run recorded about the model it was trained on."""

    name: str | None = None
    """Path, file name or Hugging Face repository, as the trainer wrote it."""
    revision: str | None = None
    """Hugging Face revision."""
    sha256: str | None = None
    """Hash of the whole file (kohya: ss_new_sd_model_hash)."""
    short_hash: str | None = None
    """Old web-UI hash: first 8 hex digits of the sha256 of 64 KiB at 1 MiB (kohya: ss_sd_model_hash)."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One saved state of an adapter."""

    path: Path
    """The file that holds the adapter's tensors."""
    name: str
    """Path relative to the run's folder, with forward slashes."""
    step: int | None
    """Optimizer step at which it was saved; None if that cannot be known."""
    epoch: float | None = None
    learning_rate: float | None = None
    """Rate at this step; the denoiser's where groups differ."""
    dose: float | None = None
    """Sum of the learning rates of all steps so far."""
    train_loss: float | None = None
    held_out_loss: float | None = None
    config: Path | None = None
    """adapter_config.json beside it."""
    scale: float | None = None
    """Multiplier on B @ A that its trainer always uses and does not write down; the file's own counts before it."""
    size: int = 0
    """Bytes of the file."""
    modified: float = 0.0
    """Modification time of the file, seconds since 1970."""
    fingerprint: str = ""
    """Changes when the file does: hash of size, modification time and header."""
    pruned: bool = False
    """`prune` deleted the file; what was measured of it stays."""


@dataclass(frozen=True, slots=True)
class Run:
    """The checkpoints of one training, in order of their steps."""

    name: str
    """Path relative to what was searched; safe as a folder name and unique in one discovery."""
    path: Path
    """The folder that the checkpoints' names are relative to."""
    trainer: str
    """Name of the variant in `checkpoints.TRAINERS` that recognised it."""
    checkpoints: tuple[Checkpoint, ...]
    """Those with a step, strictly increasing."""
    unplaced: tuple[Checkpoint, ...] = ()
    """Those whose step cannot be known, or is taken: listed, not measured."""
    step_unit: Literal["step", "epoch"] = "step"
    """What `Checkpoint.step` counts; epochs where a trainer left nothing else."""
    steps_per_epoch: float | None = None
    train_samples: int | None = None
    batch_size: int | None = None
    base: BaseReference = field(default_factory=BaseReference)
    findings: tuple[Finding, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    save_more_often: str = ""
    """The setting of this trainer that saves more checkpoints, in words."""


@dataclass(frozen=True, slots=True)
class RowSlice:
    """A base tensor, or a range of its rows."""

    tensor: str
    rows: tuple[int, int] | None = None
    """Start and stop on axis 0, or on axis 1 of an expert; None is all rows."""
    expert: int | None = None
    """Index on axis 0 of a tensor of three axes that holds all experts of a layer; None for every other tensor."""


@dataclass(frozen=True, slots=True)
class WeightRef:
    """The frozen weight below one adapter module."""

    parts: tuple[RowSlice, ...]
    """Stacked along the rows, in this order; experts along their outputs, however they are stored."""
    transposed: bool = False
    """The base is stored in x out (Conv1D of GPT-2, embeddings)."""
    embedding: bool = False
    """Looked up, not multiplied: its rows and columns are the base's own, (entries, width), though transposed."""

    def label(self) -> str:
        """The base tensors' names, joined by '+', each once."""
        return "+".join(dict.fromkeys(part.tensor for part in self.parts))


@dataclass(frozen=True, slots=True)
class Unresolved:
    """A module for which no base tensor was found."""

    reason: str


@dataclass(frozen=True, slots=True)
class TurningPoint:
    """Where a detector says that overfitting sets in."""

    index: int
    """Position among the checkpoints used."""
    step: int
    epoch: float | None
    checkpoint: str
    support_end_step: int
    """Step of the last checkpoint that the value at the turning point rests on."""


RestsOn = Literal["held_out_loss", "probe", "turning_point", "weights"]


@dataclass(frozen=True, slots=True)
class Keep:
    """The checkpoint to keep, and what that rests on."""

    checkpoint: str
    step: int
    epoch: float | None
    rests_on: RestsOn


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checkpoint worth comparing by eye."""

    checkpoint: str
    step: int
    why: str


Status = Literal["unhealthy", "no_base_model", "too_few_checkpoints", "no_second_valley", "turning_point"]


@dataclass(frozen=True, slots=True)
class BaseModelSummary:
    """Which base a run was measured against."""

    path: str | None
    matched: int
    """Modules with a base weight."""
    total: int
    """All modules of the adapter."""


@dataclass(frozen=True, slots=True)
class RunNotes:
    """What the tables do not hold of a run; kept in the metadata of layers.parquet, for reports without checkpoints."""

    path: str | None = None
    trainer: str | None = None
    step_unit: str = "step"
    save_more_often: str = ""
    base: BaseModelSummary = BaseModelSummary(None, 0, 0)
    base_files: tuple[str, ...] = ()
    """Where it was found, as absolute paths."""
    base_problem: str = ""
    """Why there is no base model, where there is none."""
    measured_with: str = ""
    """Changes when stored rows must not be reused: other base, other columns."""
    measured: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    """Checkpoint to its fingerprint and that of the one before it, as they were when its rows were measured, and to
    the type that most of its numbers are stored in; in one file with the rows, so that neither is without the other."""
    findings: tuple[Finding, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    pruned: tuple[str, ...] = ()
    """Checkpoints whose rows stay though `prune` deleted their files."""
    settings: dict[str, str] = field(default_factory=dict)
    """What the last file and adapter_config.json say of the training, for `compare`: 'optimizer' to 'AdamW'."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready form."""
        return {**asdict(self), "skipped": [skipped.to_dict() for skipped in self.skipped]}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> RunNotes:
        """The inverse of `to_dict`."""
        return cls(
            **{
                **document,
                "base": BaseModelSummary(**document["base"]),
                "base_files": tuple(document["base_files"]),
                "measured": {name: (own, before, dtype) for name, (own, before, dtype) in document["measured"].items()},
                "findings": tuple(map(Finding.from_dict, document["findings"])),
                "skipped": tuple(map(Skipped.from_dict, document["skipped"])),
                "pruned": tuple(document.get("pruned", ())),
            }
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer for one run; `to_dict` is verdict.json."""

    run: str
    status: Status
    keep: Keep | None
    turning_point: TurningPoint | None
    candidates: tuple[Candidate, ...]
    evidence: dict[str, Any]
    last_is_past_turning_point: bool | None
    window: int | None
    """In checkpoints; None where no window fits."""
    window_reason: str
    """Why this window: one clause, for people."""
    cadence_steps: float | None
    """Median step between checkpoints."""
    detector: str
    similarity: str
    components: tuple[str, ...]
    """Those that enter CS."""
    base_model: BaseModelSummary
    checkpoints: int
    """How many have a place in the series."""
    findings: tuple[Finding, ...]
    skipped: tuple[Skipped, ...] = ()
    trainer: str | None = None
    adapter: str | None = None
    path: str | None = None
    """The run's folder; `keep.checkpoint` is relative to it."""
    step_unit: str = "step"
    """What all steps here count; `epoch` where a trainer left nothing else."""
    message: str = ""
    """The verdict in one sentence."""
    versions: dict[str, str] = field(default_factory=dict)
    ignored: int = 0
    """Findings that `--ignore` or `--select` left out."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready form: contract of verdict.json."""
        findings = [finding.to_dict() for finding in self.findings]
        skipped = [skipped.to_dict() for skipped in self.skipped]
        return {"schema": SCHEMA, **asdict(self), "findings": findings, "skipped": skipped}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Verdict:
        """The inverse of `to_dict`; fields that this version does not know are left out.

        Raises:
            SeriesError: a field is missing or of another shape.
        """
        nested: dict[str, Callable[[Any], Any]] = {
            "keep": lambda value: value and Keep(**value),
            "turning_point": lambda value: value and TurningPoint(**value),
            "candidates": lambda value: tuple(Candidate(**entry) for entry in value),
            "components": tuple,
            "base_model": lambda value: BaseModelSummary(**value),
            "findings": lambda value: tuple(map(Finding.from_dict, value)),
            "skipped": lambda value: tuple(map(Skipped.from_dict, value)),
        }
        known = {f.name for f in fields(cls)}
        try:
            given = {key: nested.get(key, lambda value: value)(document[key]) for key in document if key in known}
            verdict = cls(**given)
            if isinstance(given["evidence"], dict) and all(isinstance(p.step, int) for p in verdict.points()):
                return verdict
        except (TypeError, KeyError, AttributeError):
            pass
        raise SeriesError("not a verdict of this version, or changed by hand", "run `lora-forensics scan` again")

    def points(self) -> tuple[Keep | TurningPoint | Candidate, ...]:
        """All checkpoints that the verdict names."""
        return tuple(point for point in (self.keep, self.turning_point, *self.candidates) if point is not None)


@dataclass(frozen=True, slots=True)
class Gate:
    """Which findings fail a pipeline; `gate` judges by it."""

    fail_on: frozenset[str] = frozenset()
    """Rules, and severities that count together with all above them."""
    accepted: frozenset[str] = frozenset()
    """Fingerprints of findings that a baseline accepts."""
    accepts_all: bool = False
    """Every finding of today is accepted: a baseline is being written."""
    names: dict[str, str] = field(default_factory=dict)
    """Run to the name that it has in fingerprints, where that is another."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Everything that one scan has to say; `to_dict` is summary.json."""

    runs: tuple[Verdict, ...]
    skipped: tuple[Skipped, ...] = ()
    """What was looked at and belongs to no run."""
    versions: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None
    """OUT, where the runs' tables and plots lie; None if nothing was written."""
    gate: Gate = Gate()
    findings: tuple[Finding, ...] = ()
    """About what belongs to no run."""
    ignored: int = 0
    """Of these, how many `--ignore` or `--select` left out; each run has its own number."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready form: contract of summary.json."""
        return {
            "schema": SCHEMA,
            "runs": [verdict.to_dict() for verdict in self.runs],
            "skipped": [skipped.to_dict() for skipped in self.skipped],
            "findings": [finding.to_dict() for finding in self.findings],
            "ignored": self.ignored,
            "versions": self.versions,
        }
