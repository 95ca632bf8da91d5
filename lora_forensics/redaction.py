"""`--redact`: a summary without paths, prompts and names that people chose, for reports that are shared.

Labels take the places of names, and are the same at the next scan: a run is `run-` with six digits of a hash of its
name, a checkpoint its step, another file `file-` and six digits. Sentences lose every path, file name and quotation,
and every part of a name that is known to be one. Numbers, rules, settings of the tool and names of modules stay.
"""

from __future__ import annotations

import getpass
import hashlib
import platform
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from lora_forensics.records import BaseModelSummary, Finding, Skipped, Summary, Verdict

PATH, FILE, NAME, TEXT = "<path>", "<file>", "<name>", "'<text>'"
"""What stands for a path, a file, a name and a quotation inside a sentence."""

_USUAL = frozenset({
    "adapter", "adapter_config", "adapter_model", "base", "checkpoint", "checkpoints", "config", "data", "dataset",
    "docs", "epoch", "file", "files", "final", "final_model", "flux", "forensics", "home", "host", "image",
    "images", "last", "localhost", "log", "logs", "lora", "loras", "media", "mnt", "model", "models", "optimizer",
    "out", "output", "outputs", "private", "project", "projects", "pytorch", "pytorch_lora_weights", "root", "run",
    "runner", "runs", "safetensors", "sample", "samples", "save", "scratch", "sdxl", "src", "state", "step",
    "steps", "temp", "test", "text_encoder", "tmp", "train", "trainer", "trainer_state", "training", "transformer",
    "unet", "user", "users", "usr", "var", "volumes", "weights", "workspace",
})  # fmt: skip
"""Names that trainers and systems give, and words of our own sentences: nobody is known by them."""

_FILE = re.compile(
    r"(?<![^\s'\"()=,;:])(?!docs/)[^\s'\"()=,;:]+\.(?:safetensors|ckpt|pth?|bin|gguf|json|jsonl|ya?ml|toml|csv|txt|log|db|sqlite|parquet|npz?"
    r"|png|jpe?g|webp|py|sh|md|caption)(?!\w)",
    re.IGNORECASE,
)
_QUOTED = re.compile(
    r"(?<!\w)'.*?'(?!\w)|\"(?:\\.|[^\"\\])*\"|`[^`]*`|“[^”]*”|‘.*?’(?!\w)|„[^“”]*[“”]|«[^»]*»|「[^」]*」|『[^』]*』",
    re.DOTALL,
)
_ADDRESS = re.compile(r"\b\w[\w+.-]*://\S+|[\w.+-]+@[\w.-]*\w|\\\\[^\s'\"]+|\b[A-Za-z]:[\\/][^\s'\"]*")
_MACHINE = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?(?![\w.])|\b[\w-]+(?:\.[\w-]+)+:\d{2,5}\b")
_SECRET = re.compile(r"\b(?:hf_|sk-|gh[oprsu]_|AKIA)[\w-]{8,}|\b[0-9a-fA-F]{32,}\b")
_PART = r"[^\s'\"()=,;:<>/\\]"
_PLACE = re.compile(rf"(?<![\w<-])(?!docs/)(?!\d+/\d+(?!\S))(?:~|\.{{1,2}}|(?!-){_PART}+)?(?:[/\\]{_PART}+)+[/\\]?")
_NUMBERED = re.compile(r"(?:[-_](?:step|epoch|e|s)?\d+)+$|^(?:checkpoint|step|epoch)?[-_]?\d+$", re.IGNORECASE)
_SHORTEST = 3


def redacted(summary: Summary) -> Summary:
    """The summary as it may be shared."""
    hidden = Redaction(summary)
    names = {hidden.run(verdict.run): summary.gate.names.get(verdict.run, verdict.run) for verdict in summary.runs}
    return replace(
        summary,
        runs=tuple(hidden.verdict(verdict) for verdict in summary.runs),
        skipped=tuple(map(hidden.skipped, summary.skipped)),
        findings=tuple(map(hidden.finding, summary.findings)),
        folder=None,
        gate=replace(summary.gate, names=names),
    )


def label(kind: str, name: str) -> str:
    """'run-3f2a91': the same for the same name, and not to be read back."""
    return f"{kind}-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:6]}"


class Redaction:
    """Knows the names of a summary, and of further `places`, and takes them out of what it is given."""

    def __init__(self, summary: Summary, places: Iterable[str] = ()) -> None:
        self._checkpoints: dict[str, str] = {}
        places = [*places, *([str(summary.folder)] if summary.folder else ())]
        for verdict in summary.runs:
            self._learn(verdict)
            places += [verdict.run, verdict.path or "", verdict.base_model.path or ""]
        places += [entry.path.as_posix() for v in summary.runs for entry in v.skipped]
        places += [entry.path.as_posix() for entry in summary.skipped]
        places += [str(Path.home()), str(Path.cwd())]
        # a base that was not found is named in the sentence alone, once in quotation marks and then in places
        told = [text for v in summary.runs for text in (v.message, *(f.message for f in v.findings))]
        quoted = [found[1:-1] for text in told for found in _QUOTED.findall(text) if " " in found]
        places += [name for found in quoted for name in (found, re.split(r"[/\\]", found)[-1])]
        known = sorted({place for place in places if len(place) >= _SHORTEST}, key=len, reverse=True)
        whole = [place for place in known if "/" in place or "\\" in place or " " in place]
        self._whole = re.compile("|".join(map(re.escape, whole)) or r"(?!)")
        parts = {part for place in (*known, *self._checkpoints) for part in _parts(place)}
        people = {_user(), platform.node(), platform.node().partition(".")[0]}
        names = sorted(filter(_telling, parts | people), key=len, reverse=True)
        spelt = "|".join(re.sub(r"(?:\\[ -]|_)+", "[ _-]+", re.escape(name)) for name in names) or "(?!)"
        self._names = re.compile(rf"(?<![A-Za-z0-9])(?:{spelt})(?![A-Za-z0-9])", re.IGNORECASE)

    def run(self, name: str) -> str:
        """A run's label."""
        return label("run", name)

    def checkpoint(self, name: str, step: int | None = None, unit: str = "step") -> str:
        """A checkpoint's label: its step where that is known."""
        if step is not None:
            return _stepped(unit, name, step)
        return self._checkpoints.get(name) or label("file", name) + PurePosixPath(name).suffix

    def text(self, sentence: str) -> str:
        """A sentence without names, paths and quotations."""
        places = ((self._whole, PATH), (_QUOTED, TEXT), (_ADDRESS, PATH), (_PLACE, PATH), (_FILE, FILE))
        names = ((_MACHINE, NAME), (_SECRET, NAME), (self._names, NAME))
        for pattern, instead in (*places, *names):
            sentence = pattern.sub(instead, sentence)
        return sentence

    def skipped(self, entry: Skipped) -> Skipped:
        """A file that was left out, with its kind of file and the reason."""
        name = entry.path.as_posix()
        return replace(entry, path=Path(label("file", name) + _suffix(entry.path)), reason=self.text(entry.reason))

    def finding(self, finding: Finding) -> Finding:
        """A finding whose sentences may be shared."""
        return replace(finding, message=self.text(finding.message), hint=self.text(finding.hint))

    def verdict(self, verdict: Verdict) -> Verdict:
        """A run's verdict."""
        base = verdict.base_model
        named = None if base.path is None else label("base", base.path)
        keep, point = verdict.keep, verdict.turning_point
        return replace(
            verdict,
            run=self.run(verdict.run),
            path=None,
            keep=keep and replace(keep, checkpoint=self.checkpoint(keep.checkpoint)),
            turning_point=point and replace(point, checkpoint=self.checkpoint(point.checkpoint)),
            candidates=tuple(
                replace(entry, checkpoint=self.checkpoint(entry.checkpoint), why=self.text(entry.why))
                for entry in verdict.candidates
            ),
            evidence={key: self._value(value, key) for key, value in verdict.evidence.items()},
            base_model=BaseModelSummary(named, base.matched, base.total),
            findings=tuple(map(self.finding, verdict.findings)),
            skipped=tuple(map(self.skipped, verdict.skipped)),
            message=self.text(verdict.message),
            window_reason=self.text(verdict.window_reason),
        )

    def _value(self, value: Any, key: str) -> Any:
        """A part of the evidence."""
        if isinstance(value, dict):
            return {name: self._value(entry, name) for name, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._value(entry, key) for entry in value]
        if not isinstance(value, str):
            return value
        if key == "scorer" and not value.startswith("loss on "):
            return "a command"  # what a person typed
        if key == "checkpoint" or value in self._checkpoints:
            return self.checkpoint(value)
        return self.text(value)

    def _learn(self, verdict: Verdict) -> None:
        """Names of checkpoints, and their steps."""
        for point in verdict.points():
            self._checkpoints[point.checkpoint] = _stepped(verdict.step_unit, point.checkpoint, point.step)
        for entry in _dictionaries(verdict.evidence):
            name, step = entry.get("checkpoint"), entry.get("step")
            if isinstance(name, str) and isinstance(step, int):
                self._checkpoints[name] = _stepped(verdict.step_unit, name, step)
            for end in ("low", "high"):
                name, step = entry.get(end), entry.get(f"{end}_step")
                if isinstance(name, str) and isinstance(step, int):
                    self._checkpoints[name] = _stepped(verdict.step_unit, name, step)


def _stepped(unit: str, name: str, step: int) -> str:
    return f"{'epoch' if unit == 'epoch' else 'step'}-{step}{_suffix(PurePosixPath(name))}"


def _suffix(path: PurePath) -> str:
    return path.suffix if _FILE.fullmatch(f"x{path.suffix}") else ""


def _dictionaries(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for entry in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from _dictionaries(entry)


def _parts(place: str) -> Iterator[str]:
    """Components of a path, their stems, and these without the numbers at their ends."""
    for part in re.split(r"[/\\]+", place):
        stem = PurePosixPath(part).stem if _FILE.search(part) else part
        yield from (part, stem, _NUMBERED.sub("", stem))


def _telling(part: str) -> bool:
    return len(part) >= _SHORTEST and part.lower() not in _USUAL and not _NUMBERED.fullmatch(part)


def _user() -> str:
    """Whom this process runs for; '' where nobody has that number."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return ""
