"""Layouts of base models: how publishers name and divide the weights of a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Layout:
    """One way of naming and dividing weights."""

    name: str
    description: str
    source: str
    example: str
    """The name of a tensor in it, as resolution sees it."""


BASE_LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "diffusers",
            "a diffusers folder: unet/ or transformer/ (two of them for Wan 2.2) beside text encoders",
            "https://huggingface.co/docs/diffusers/using-diffusers/other-formats",
            "transformer/transformer_blocks.0.attn.to_q.weight",
        ),
        Layout(
            "ldm",
            "one file with LDM or SGM names (SD1.5, SD2, SDXL); OpenCLIP's fused in_proj",
            "https://github.com/Stability-AI/generative-models",
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",
        ),
        Layout(
            "publisher",
            "one file with the publisher's own names (SD3, FLUX, Chroma, HunyuanVideo, Wan, Lumina-2, ...), bare"
            " or behind `model.diffusion_model.` or `net.`; fused query, key and value, swapped scale and shift",
            "https://github.com/black-forest-labs/flux, and the repositories of the other publishers",
            "double_blocks.0.img_attn.qkv.weight",
        ),
        Layout(
            "all-in-one",
            "one file with the denoiser, `text_encoders.` and `vae.`, as ComfyUI saves it",
            "https://github.com/Comfy-Org/ComfyUI",
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
        ),
        Layout(
            "hugging-face",
            "a Hugging Face folder, sharded or not, of a language or vision model: experts fused or apart, tied heads,"
            " Conv1D, names that differ in memory; also text encoders in files of their own",
            "https://huggingface.co/docs/transformers",
            "model.layers.0.self_attn.q_proj.weight",
        ),
        Layout(
            "llama.cpp",
            "a GGUF file of a language model or text encoder",
            "https://github.com/ggml-org/llama.cpp",
            "blk.0.attn_q.weight",
        ),
    )
}
"""Every layout by name."""
