"""A base of another family is called so, and its weights are not taken for the adapter's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lora_forensics.base_model import resolve
from lora_forensics.base_model.family import adapter_family, base_family
from lora_forensics.base_model.resolution import Resolver
from lora_forensics.records import Unresolved, WeightRef

FAMILIES = {
    "kohya_sd15__ldm": "SD1.5",
    "diffusers_sd15_old__ldm": "SD1.5",
    "kohya_sd15_conv__diffusers": "SD1.5",
    "kohya_sd21__ldm": "SD2",
    "kohya_sdxl__ldm": "SDXL",
    "kohya_sdxl_conv__diffusers": "SDXL",
    "kohya_flux__aio": "FLUX.1",
    "kohya_flux__diffusers": "FLUX.1",
    "xlabs_flux__bfl": "FLUX.1",
    "musubi_flux2dev__diffusers": "FLUX.2",
    "kohya_sd35m__diffusers": "SD3 or SD3.5 medium",
    "kohya_lumina2__native": "Lumina-2",
    "musubi_zimage__fused": "Z-Image",
    "diffusers_hunyuanvideo__native": "HunyuanVideo",
    "musubi_wan21_i2v14b__diffusers": "Wan 14B",
    "peft_llama__hf": "a language model of width 64",
    "peft_gpt2__hub": "a language model of width 64",
}


@pytest.mark.parametrize(("name", "family"), FAMILIES.items())
def test_families(name: str, family: str, inventory: Callable[[str], Any]) -> None:
    """Adapter and base are told apart from each other, each from its own names and widths."""
    modules, tensors, _ = inventory(name)
    assert adapter_family(modules) == family
    assert base_family(tensors) == family


@pytest.mark.parametrize(
    ("adapter", "base"),
    [
        ("kohya_sdxl__ldm", "kohya_sd15__ldm"),
        ("kohya_sd15__ldm", "kohya_sdxl_conv__diffusers"),
        ("kohya_flux__aio", "kohya_sdxl__ldm"),
        ("musubi_wan21_i2v14b__diffusers", "diffusers_hunyuanvideo__native"),
        ("peft_llama__hf", "kohya_sd15__ldm"),
    ],
)
def test_another_family(adapter: str, base: str, inventory: Callable[[str], Any]) -> None:
    """The reason names both; of the denoiser nothing is matched by chance."""
    modules, tensors = inventory(adapter).modules, inventory(base).tensors
    reason = f"this adapter is for {FAMILIES[adapter]}, this base is {FAMILIES[base]}"
    for name, found in resolve(modules, tensors).items():
        if isinstance(found, Unresolved):
            assert found.reason.startswith(reason)
        else:
            assert name.startswith("lora_te"), name


def test_the_same_family_is_not_blamed(inventory: Callable[[str], Any]) -> None:
    """Modules that are not there, and modules of a relative that fits, are no case of another family."""
    modules, tensors, _ = inventory("kohya_flux__aio")
    lost = {f"lora_unet_double_blocks_{n}_img_attn_qkv": (9216, 3072) for n in range(90, 99)}
    assert {found.reason for found in resolve(lost, tensors).values()} == {"no base tensor has this name"}
    qkv = {name: shape for name, shape in modules.items() if name.endswith("img_attn_qkv")}
    chroma = {name: shape for name, shape in tensors.items() if "img_mod" not in name}
    chroma["model.diffusion_model.distilled_guidance_layer.in_proj.weight"] = (5120, 64)
    assert base_family(chroma) == "Chroma"
    assert all(isinstance(found, WeightRef) for found in resolve(qkv, chroma).values())


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "SDXL"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "SD1.5"),
        ({"ss_base_model_version": "flux1"}, "FLUX.1"),
        ({"modelspec.architecture": "Flux.2-dev/lora"}, "FLUX.2"),
        ({"ss_base_model_version": "something new"}, None),
        ({}, None),
    ],
)
def test_metadata(metadata: dict[str, str], family: str | None) -> None:
    """Where names tell nothing, what the trainer recorded does."""
    modules: dict[str, tuple[int | None, int | None]] = {"lora_te_text_model_encoder_layers_9_mlp_fc1": (3072, 768)}
    assert adapter_family(modules, metadata) == family
    base = Resolver({"unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 1024)})
    reason = f"this adapter is for {family}, this base is SD2: " if family else ""
    assert base.resolve(modules, metadata) == dict.fromkeys(
        modules, Unresolved(f"{reason}no base tensor has this name")
    )
