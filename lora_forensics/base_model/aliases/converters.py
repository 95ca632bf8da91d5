"""Diffusers' converters of single files: which there are, and which one a set of names and shapes asks for.

Importing them takes seconds, so nothing here does until it is called.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from importlib import import_module
from typing import Any

from lora_forensics.base_model.names import numbers_after
from lora_forensics.base_model.slices import Shape
from lora_forensics.base_model.tracers import Convert

LDM = "model.diffusion_model."
"""The prefix that the converter of LDM UNets expects."""

_TRANSFORMERS: tuple[tuple[str, str], ...] = (
    ("flux-2", "flux2_transformer_checkpoint"),
    ("flux-3", "flux3_transformer_checkpoint"),
    ("flux", "flux_transformer_checkpoint"),
    ("chroma", "chroma_transformer_checkpoint"),
    ("sd3", "sd3_transformer_checkpoint"),
    ("ltx2", "ltx2_transformer"),
    ("ltx-video", "ltx_transformer_checkpoint"),
    ("mochi", "mochi_transformer_checkpoint"),
    ("hunyuan-video", "hunyuan_video_transformer"),
    ("auraflow", "auraflow_transformer_checkpoint"),
    ("lumina2", "lumina2"),
    ("sana", "sana_transformer"),
    ("wan", "wan_transformer"),
    ("hidream", "hidream_transformer"),
    ("cosmos", "cosmos_transformer_checkpoint"),
    ("z-image-turbo", "z_image_transformer_checkpoint"),
    ("qwen-image-2.1", "qwen_image21_transformer_checkpoint"),
    ("krea2", "krea2_transformer_checkpoint"),
    ("stable_cascade", "stable_cascade_unet_single_file"),
)
"""How the answer of `infer_diffusers_model_type` begins (first match), and the converter for it."""


def single_file_utils() -> Any:
    """Diffusers' module of converters, untyped as it is."""
    return import_module("diffusers.loaders.single_file_utils")


def transformer_converters() -> Iterator[Any]:
    """All converters of transformers that the installed diffusers has."""
    for _, name in _TRANSFORMERS:
        convert = getattr(single_file_utils(), f"convert_{name}_to_diffusers", None)
        if convert is not None:
            yield convert


def transformer_converter(shapes: Mapping[str, Shape]) -> Convert | None:
    """The converter of the family that diffusers sees in these names and shapes."""
    import torch

    utils = single_file_utils()
    meta = {path: torch.empty(shape, device="meta") for path, shape in shapes.items()}
    for prefix in ("", "net."):  # cosmos is told by names that keep the prefix of its files
        try:
            kind = utils.infer_diffusers_model_type({prefix + path: tensor for path, tensor in meta.items()})
        except Exception:  # noqa: BLE001, S112 - it reads axes and keys that a foreign file need not have
            continue
        for beginning, name in _TRANSFORMERS:
            if kind.startswith(beginning):
                return getattr(utils, f"convert_{name}_to_diffusers", None)
    return None


def ldm_unet_converter(names: Collection[str]) -> Convert:
    """The converter of LDM and SGM UNets, with the part of the config that it asks for read off the names."""
    convert = single_file_utils().convert_ldm_unet_checkpoint
    blocks = sorted(numbers_after("input_blocks", names))
    first_down = next((i for i in blocks if f"{LDM}input_blocks.{i}.0.op.weight" in names), 3)
    config: dict[str, Any] = {"layers_per_block": first_down - 1}
    if f"{LDM}label_emb.0.0.weight" in names:
        config["addition_embed_type"] = "text_time"
    return lambda columns: convert(columns, config)
