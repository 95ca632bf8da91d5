"""Which files hold a base model: one file, a Hugging Face folder (sharded or not), or a diffusers folder."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePath

from lora_forensics.base_model.storage.gguf import SUFFIX as GGUF
from lora_forensics.errors import BaseModelError
from lora_forensics.tensors import SAFETENSORS

_WEIGHTS = re.compile(
    r"(?:model|diffusion_pytorch_model|pytorch_model)(?P<variant>\.\w+)?\.(?P<format>safetensors|bin)"
    r"(?P<index>\.index(?P<index_variant>\.\w+)?\.json)?"
)
_NO_COMPONENTS = ("safety_checker", "feature_extractor", "image_encoder")
"""Folders of a pipeline that no adapter is trained on; some hold gigabytes."""

_EXPECTED = (
    "expected a .safetensors, .gguf or .ckpt file, a Hugging Face model folder (model.safetensors, or shards and their"
    " index), or a diffusers folder (unet/ or transformer/ beside text_encoder/)"
)


def tensor_files(path: Path) -> list[tuple[str, Path]]:
    """The files of a base, each with the prefix that its tensors' names get.

    Raises:
        BaseModelError: nothing is there, it is not a base model, or a shard is missing; the message says which.
    """
    if path.is_file():
        return [("", path)]
    if not path.exists():
        raise BaseModelError(f"{path}: no such file or folder", _EXPECTED)
    files = folder_files(path)
    if files:
        return files
    if (path / "adapter_config.json").is_file():
        raise BaseModelError(f"{path}: this is an adapter, not the base model below it", _EXPECTED)
    single = [file for suffix in (SAFETENSORS, GGUF) for file in path.glob(f"*{suffix}")]
    if len(single) == 1:
        return [("", single[0])]
    several = f" ({len(single)} model files lie in it: name one of them)" if single else ""
    raise BaseModelError(f"{path}: not a base model{several}", _EXPECTED)


def folder_files(folder: Path) -> list[tuple[str, Path]]:
    """The same for a folder in a known layout; empty if it is none.

    Raises:
        BaseModelError: a shard is missing.
    """
    pipeline = (folder / "model_index.json").is_file()
    own = _weights(folder)
    if own and not pipeline:
        return [("", file) for file in own]
    inner = sorted(inner for inner in folder.iterdir() if inner.is_dir() and inner.name not in _NO_COMPONENTS)
    if pipeline or {"unet", "transformer"} & {inner.name for inner in inner}:
        return [(f"{component.name}/", file) for component in inner for file in _weights(component)]
    return []


def _weights(folder: Path) -> list[Path]:
    """The weight files in one folder: of several variants (fp16, ema) the plain one, and safetensors before pickles."""
    found = {file: match for file in folder.iterdir() if (match := _WEIGHTS.fullmatch(file.name))}
    if not found:
        return []

    def rank(file: Path) -> tuple[bool, bool, bool, str]:
        match = found[file]
        return (
            bool(match["variant"] or match["index_variant"]),
            match["format"] == "bin",
            bool(match["index"]),
            file.name,
        )

    best = min(found, key=rank)
    return _shards(best) if found[best]["index"] else [best]


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(map(PurePath, set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(f"{index}: not an index of shards", "copy or download the model again") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise BaseModelError(
            f"{index.parent}: {len(missing)} of {len(names)} shards missing: {', '.join(map(str, missing))}",
            "copy or download the missing files; `--download` does it for a model of the Hugging Face hub",
        )
    return [index.parent / name for name in names]
