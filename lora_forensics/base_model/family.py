"""Which family of models an adapter was trained on, and of which a base is: told from names, widths and metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from lora_forensics.base_model.names import DENOISERS, TEXT, flatten, readings, split_tensor, unwrap
from lora_forensics.base_model.slices import ModuleShape, Shape, flat_shape

_UNET = r"^(down|up|mid|input|output|middle)_blocks?_.*attn2_to_[kv]$"
_JOINT = r"^(joint_blocks_\d+_(x|context)_block_attn_(qkv|proj)|transformer_blocks_\d+_attn_add_[qkv]_proj)$"
_WAN = r"^blocks_\d+_((self|cross)_attn_[qkvo](_img)?|attn[12]_to_[qkv])$"
_NEXT_DIT = r"^(layers|noise_refiner|context_refiner)_\d+_(attention_(qkv|to_q|out)|attn_to_q)$"
_SINGLE = r"^single_(transformer_)?blocks_\d+_(linear1|attn_to_q|proj_mlp)$"

_SIGNS: tuple[tuple[str, str, int | None], ...] = (
    ("SD1.5", _UNET, 768),
    ("SD2", _UNET, 1024),
    ("SDXL", _UNET, 2048),
    ("the SDXL refiner", _UNET, 1280),
    ("Qwen-Image", r"^transformer_blocks_\d+_(img|txt)_(mod_1|mlp_net_0_proj|mlp_net_2)$", None),
    ("HunyuanVideo", r"^double_blocks_\d+_(img|txt)_(mlp_fc[12]|mod_linear)$|token_refiner", None),
    ("HunyuanVideo", r"^(transformer_blocks_19|double_blocks_19|single_(transformer_)?blocks_39)_", 3072),
    ("FLUX.2", r"^single_transformer_blocks_\d+_attn_to_qkv_mlp_proj$|^(single|double)_stream_modulation", None),
    ("FLUX.2", r"^double_blocks_\d+_(img|txt)_attn_(qkv|proj)$", 6144),
    ("FLUX.2", r"^double_blocks_\d+_(img|txt)_attn_(qkv|proj)$", 4096),
    ("Chroma", r"^distilled_guidance_layer_", None),
    ("FLUX.1", r"^double_blocks_\d+_(img|txt)_(mlp_[02]|mod_lin|attn_qkv|attn_proj)$", None),
    ("FLUX.1", r"^double_blocks_\d+_processor_", None),
    ("FLUX.1", _SINGLE, 3072),
    ("SD3 or SD3.5 medium", _JOINT, 1536),
    ("SD3.5 large", _JOINT, 2432),
    ("FLUX.1", r"^transformer_blocks_\d+_attn_add_[qkv]_proj$", 3072),
    ("Lumina-2", _NEXT_DIT, 2304),
    ("Z-Image", _NEXT_DIT, 3840),
    ("Wan 14B", _WAN, 5120),
    ("Wan 1.3B", _WAN, 1536),
    ("Wan 2.2 5B", _WAN, 3072),
    ("Anima or Cosmos", r"^blocks_\d+_(self|cross)_attn_[qkv]_proj$", None),
    ("HiDream", r"^(double|single)_stream_blocks_", None),
    ("AuraFlow", r"^(joint|single)_transformer_blocks_\d+_.*$|^(double|single)_layers_\d+_attn_w[12]q$", 3072),
    ("PixArt", r"^transformer_blocks_\d+_attn2_to_[qk]$", 1152),
    ("LTX-Video", r"^transformer_blocks_\d+_attn2_to_[qk]$", 2048),
    ("LTX-Video", r"^transformer_blocks_\d+_attn2_to_[qk]$", 4096),
    ("Sana", r"^transformer_blocks_\d+_attn2_to_[qk]$", 2240),
    ("CogVideoX", r"^transformer_blocks_\d+_attn1_to_[qkv]$", None),
)
"""Family, a pattern for flattened names, and the number of columns that the weight must have; the first sign counts."""

_LANGUAGE = re.compile(
    r"(^|_)((layers|h|block|blocks|layer)_\d+_(self_attn|attn|attention|self_attention|mlp)_"
    r"(q_proj|k_proj|qkv_proj|c_proj|query_key_value|Wqkv|self_query|gate_proj|attention_query|q_lin)"
    r"|blk_\d+_attn_(q|k|qkv))$"
)

_RECORDED: tuple[tuple[str, str], ...] = (
    ("SDXL", r"sdxl|stable-diffusion-xl"),
    ("SD1.5", r"sd_v1|sd_1|stable-diffusion-v1"),
    ("SD2", r"sd_v2|sd_2|stable-diffusion-v2"),
    ("FLUX.2", r"flux[-_.]?2"),
    ("FLUX.1", r"flux"),
    ("SD3.5 large", r"(sd|stable-diffusion-)3[.-]5-?large"),
    ("SD3 or SD3.5 medium", r"sd3|stable-diffusion-3"),
    ("Lumina-2", r"lumina"),
    ("Qwen-Image", r"qwen[-_]?image"),
    ("HunyuanVideo", r"hunyuan"),
    ("Z-Image", r"z[-_]?image"),
)
"""Families by what trainers write into `ss_base_model_version` and `modelspec.architecture`."""


def adapter_family(modules: Mapping[str, ModuleShape], metadata: Mapping[str, str] | None = None) -> str | None:
    """The family that an adapter was trained on; None if nothing tells it."""
    family = _told(_modules(modules))
    if family:
        return family
    recorded = " ".join((metadata or {}).get(key, "") for key in ("ss_base_model_version", "modelspec.architecture"))
    return next((name for name, pattern in _RECORDED if re.search(pattern, recorded, re.IGNORECASE)), None)


def base_family(shapes: Mapping[str, Shape]) -> str | None:
    """The family of a base model; None if nothing tells it."""
    return _told(_tensors(shapes))


def _modules(modules: Mapping[str, ModuleShape]) -> Iterator[tuple[str, int | None]]:
    for name, (_, columns) in modules.items():
        reading = next(readings(name))
        if set(DENOISERS) & set(reading.components):
            yield flatten(unwrap(reading.path)), columns


def _tensors(shapes: Mapping[str, Shape]) -> Iterator[tuple[str, int | None]]:
    for name, shape in shapes.items():
        component, path = split_tensor(name)
        if component in (*DENOISERS, TEXT) and path.endswith(".weight"):
            yield flatten(unwrap(path.removesuffix(".weight"))), flat_shape(shape)[1]


def _told(names: Iterable[tuple[str, int | None]]) -> str | None:
    known = list(names)
    for family, pattern, width in _SIGNS:
        compiled = re.compile(pattern)
        if any(width in (None, columns) and compiled.search(name) for name, columns in known):
            return family
    widths = sorted({columns for name, columns in known if columns and _LANGUAGE.search(name)})
    return f"a language model of width {widths[0]}" if widths else None
