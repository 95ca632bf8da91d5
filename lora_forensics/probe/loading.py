"""What both held-out scorers need: the base model's folder, a device, and adapters that are swapped in one model."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lora_forensics.errors import BaseModelError, ScoreError, UsageError
from lora_forensics.records import Checkpoint
from lora_forensics.tensors import file_fingerprint

_EXTRA = "pip install 'lora-forensics[probe]'"
_REWRITES = ("pissa", "olora", "corda", "eva", "loftq", "lora_ga")
"""Initialisations for which peft takes something out of the base weight when it loads an adapter."""


def missing(library: str) -> UsageError:
    """The error for a library that the extra brings."""
    return UsageError(f"--held-out needs {library}, which is not installed", _EXTRA)


def base_folder(files: Sequence[Path], marker: str) -> Path:
    """The folder of a base model that holds `marker`, which libraries load it by.

    Raises:
        BaseModelError: the base was not found, or is no such folder.
    """
    if not files:
        raise BaseModelError("--held-out needs the base model, which was not found", "pass --base PATH")
    for file in files:
        places = [file, *file.parents[:2]]
        for place in places:
            if (place / marker).is_file():
                return place
    hint = "pass --base with the model's folder, or score with a command of your own: --score"
    raise BaseModelError(f"{files[0]} lies in no folder with a {marker}", hint)


def base_mark(files: Sequence[Path]) -> str:
    """Changes when the base model does."""
    return "|".join(file_fingerprint(file) for file in files if file.is_file())


def device_of(name: str) -> Any:
    """The torch device; `auto` takes the first accelerator there is.

    Raises:
        UsageError: there is no such device.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name} cannot be used: {str(error).splitlines()[0]}", "use --device cpu") from error
    return torch.device(name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and remarks of libraries about models that they load."""
    from importlib import import_module

    logs = [import_module(f"{name}.utils.logging") for name in ("transformers", "diffusers") if name in sys.modules]
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
            log.enable_progress_bar()


class PeftSlot:
    """A model into which one PEFT adapter after another is put; its own weights are loaded once, if peft allows it."""

    def __init__(self, load: Callable[[], Any], device: Any) -> None:
        """`load` gives the base model, on `device`."""
        self._load = load
        self._device = str(device)
        self._wrapped: Any = None
        self._count = 0

    def put(self, checkpoint: Checkpoint) -> Any:
        """The model with this adapter and no other.

        Raises:
            ScoreError: peft cannot load it, or does not find all of it in the file.
        """
        try:
            import peft  # noqa: F401 - only whether it is there
        except ImportError as error:
            raise missing("peft") from error
        try:
            with quiet(), _folder(checkpoint) as folder:
                absent = self._swap(folder)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, OSError, SafetensorError) as error:
            self._wrapped = None  # half of it may be in the model: the next one starts from a fresh base
            raise ScoreError(f"peft cannot load it: {first_line(error)}") from error
        if absent:
            self._wrapped = None
            raise ScoreError(f"the file lacks {len(absent)} of the adapter's tensors, {absent[0]} first")
        return self._wrapped

    def _swap(self, folder: Path) -> list[str]:
        """Load an adapter in the place of the one before; the tensors that its file lacks."""
        from peft import PeftConfig, PeftModel

        if self._wrapped is not None and _rewrites_base(self._wrapped.peft_config, folder):
            self._wrapped = None
        before = f"probe{self._count}"
        self._count += 1
        name = f"probe{self._count}"
        if self._wrapped is None:
            config = PeftConfig.from_pretrained(str(folder))
            config.inference_mode = True
            self._wrapped = PeftModel(self._load(), config, name)
        found = self._wrapped.load_adapter(folder, name, torch_device=self._device)
        self._wrapped.set_adapter(name)
        if before in self._wrapped.peft_config:
            self._wrapped.delete_adapter(before)
        self._wrapped.eval()
        return list(found.missing_keys)


def _rewrites_base(configs: Mapping[str, Any], folder: Path) -> bool:
    """Whether this adapter or the one before takes something out of the base weight while it is loaded."""
    settings = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    known = [settings.get("init_lora_weights"), *(getattr(c, "init_lora_weights", None) for c in configs.values())]
    return any(isinstance(entry, str) and entry.lower().startswith(_REWRITES) for entry in known)


@contextlib.contextmanager
def _folder(checkpoint: Checkpoint) -> Iterator[Path]:
    """The checkpoint as a folder under the names that peft looks for."""
    if checkpoint.config is None:
        raise ScoreError("no adapter_config.json lies beside it: score with a command of your own")
    beside = checkpoint.config.parent == checkpoint.path.parent
    if beside and checkpoint.path.name.startswith("adapter_model.") and checkpoint.config.name == "adapter_config.json":
        yield checkpoint.path.parent
        return
    with tempfile.TemporaryDirectory() as name:
        shutil.copyfile(checkpoint.config, Path(name) / "adapter_config.json")
        shutil.copyfile(checkpoint.path, Path(name) / f"adapter_model{checkpoint.path.suffix}")
        yield Path(name)


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
