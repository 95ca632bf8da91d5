"""Finding the base model that a run names, without the network unless asked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from lora_forensics.base_model.files import folder_files
from lora_forensics.base_model.model import BaseModel, open_base
from lora_forensics.base_model.storage import BASE_FILES
from lora_forensics.errors import BaseModelError
from lora_forensics.records import BaseReference

_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_GIVE = "pass --base PATH"
_PARENTS = 3
"""How many folders above a run are looked at, whatever was searched."""


def find_base(
    reference: BaseReference,
    run_folder: Path,
    search_root: Path | None,
    given: Sequence[Path] = (),
    download: bool = False,
) -> BaseModel:
    """Open the base of a run: what is given, else what the run recorded, on disk or in the Hugging Face cache.

    Args:
        reference: What the run recorded.
        run_folder: Where relative paths start; its parents are looked at too.
        search_root: Folder that was searched for runs; parents are followed to the one above it.
        given: Paths that overrule the record (`--base`).
        download: Whether a repository that is not in the cache may be downloaded.

    Raises:
        BaseModelError: it is not found, or damaged; the hint says where it was looked for and what to pass.
    """
    if given:
        return open_base(given)
    if not reference.name:
        raise BaseModelError("the run does not say which base model it was trained on", _GIVE)
    looked: list[str] = []
    for path in dict.fromkeys(_places(reference.name, run_folder, search_root)):
        looked.append(str(path))
        if _holds_base(path):
            return open_base([path])
    hint = _GIVE
    if _is_repository(reference.name):
        snapshot = _cached(reference.name, reference.revision)
        if download and not _is_complete(snapshot):
            snapshot = _downloaded(reference.name, reference.revision)
        if snapshot and _holds_base(snapshot):
            return open_base([snapshot])
        looked.append("the Hugging Face hub" if download else "the Hugging Face cache")
        hint += "" if download else ", or --download to fetch it from the Hugging Face hub"
    raise BaseModelError(f"base model {reference.name!r} not found", f"{hint}; looked at: {', '.join(looked)}")


def _places(name: str, run_folder: Path, search_root: Path | None) -> Iterator[Path]:
    """The recorded path itself, then it and its last step in the run's folder and above."""
    recorded = Path(name).expanduser() if name.startswith("~/") else Path(name)
    last = (PureWindowsPath(name) if "\\" in name else PurePosixPath(name)).name
    if recorded.is_absolute():
        yield recorded
    if last in ("", ".."):
        return
    run_folder = run_folder.absolute()
    for folder in _folders(run_folder, search_root):
        for path in (folder / recorded, folder / last):
            if path != run_folder and path not in run_folder.parents:  # what holds the run is not its base
                yield path


def _folders(run_folder: Path, search_root: Path | None) -> Iterator[Path]:
    stop = search_root.absolute().parent if search_root is not None else None
    yield run_folder
    for level, parent in enumerate(run_folder.parents, start=1):
        if level > _PARENTS and (stop is None or not parent.is_relative_to(stop)):
            return
        yield parent


def _holds_base(path: Path) -> bool:
    try:
        return path.suffix in BASE_FILES if path.is_file() else path.is_dir() and bool(folder_files(path))
    except (OSError, ValueError):  # a recorded name may be no possible path: too long, or with a null byte
        return False


def _is_complete(snapshot: Path | None) -> bool:
    try:
        return snapshot is not None and _holds_base(snapshot)
    except BaseModelError:  # a shard is missing: an interrupted download
        return False


def _is_repository(name: str) -> bool:
    return _REPOSITORY.fullmatch(name) is not None and not name.endswith(BASE_FILES)


def _cached(repository: str, revision: str | None) -> Path | None:
    """The folder of a repository in the Hugging Face cache, which is where HF_HOME says."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _downloaded(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
    except (HFValidationError, OSError) as error:  # the hub's own errors are OSErrors
        raise BaseModelError(f"base model {repository!r} cannot be downloaded: {error}", _GIVE) from error
