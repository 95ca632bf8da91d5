"""Tiny Stable Diffusion pipelines and LoRAs that diffusers' and peft's own code trains and saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from factories import library

from lora_forensics.records import Checkpoint

SIDE = 16
CROSS = 16


def clip_tokenizer(folder: Path) -> Any:
    """A real CLIP tokenizer whose words are letters."""
    letters = [chr(code) for code in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return library("transformers").CLIPTokenizer.from_pretrained(folder, model_max_length=12)


def text_encoder(projected: bool = False, width: int = CROSS) -> Any:
    """A CLIP text encoder of one layer or two."""
    transformers = library("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=54, hidden_size=width, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=0, eos_token_id=1, projection_dim=width,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config)


def vae(channels: int = 4) -> Any:
    """An autoencoder that halves each side."""
    return library("diffusers").AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, norm_num_groups=2, sample_size=SIDE,
    )  # fmt: skip


def unet(**settings: Any) -> Any:
    """A UNet with the blocks of Stable Diffusion."""
    return library("diffusers").UNet2DConditionModel(
        **{
            "sample_size": SIDE // 2, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
            "block_out_channels": (8, 8), "norm_num_groups": 4, "cross_attention_dim": CROSS, "attention_head_dim": 2,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), **settings,
        }
    )  # fmt: skip


def pipeline(folder: Path, prediction: str = "epsilon") -> Path:
    """A whole Stable Diffusion in a folder."""
    diffusers = library("diffusers")
    torch.manual_seed(0)
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=text_encoder(), tokenizer=clip_tokenizer(folder / "words"), unet=unet(),
        scheduler=diffusers.DDPMScheduler(beta_schedule="scaled_linear", prediction_type=prediction),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder / "base")
    return folder / "base"


def images(folder: Path, number: int = 3) -> Path:
    """Pictures of colours with captions."""
    image = library("PIL.Image")
    folder.mkdir(parents=True)
    random = np.random.default_rng(4)
    for place in range(number):
        pixels = random.integers(0, 255, (SIDE, SIDE + 4 * place, 3), dtype=np.uint8)
        image.fromarray(pixels).save(folder / f"{place}.png")
        (folder / f"{place}.txt").write_text("abc"[place % 3])
    return folder


def train(base: Path, folder: Path, text: bool = True) -> list[Checkpoint]:
    """Train a LoRA with diffusers' and peft's own code, save four checkpoints with diffusers' own writer."""
    diffusers, peft = library("diffusers"), library("peft")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    torch.manual_seed(5)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    if text:
        pipe.text_encoder.add_adapter(
            peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])
        )
    parts = [pipe.unet, *([pipe.text_encoder] if text else [])]
    parameters = [p for part in parts for name, p in part.named_parameters() if "lora" in name]
    optimizer = torch.optim.AdamW(parameters, lr=5e-2)
    ids = torch.randint(2, 50, (2, 12))
    found = []
    for step in range(1, 5):
        noisy, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
        optimizer.zero_grad()
        predicted = pipe.unet(noisy, 500, encoder_hidden_states=pipe.text_encoder(ids)[0]).sample
        (predicted - noise).square().mean().backward()
        optimizer.step()
        states = [peft.get_peft_model_state_dict(part) for part in parts]
        where = folder / f"checkpoint-{10 * step}"
        layers = {"text_encoder_lora_layers": states[1]} if text else {}
        pipe.save_lora_weights(where, unet_lora_layers=states[0], **layers)
        found.append(checkpoint_at(where / "pytorch_lora_weights.safetensors", folder, 10 * step))
    return found


def checkpoint_at(path: Path, folder: Path, step: int) -> Checkpoint:
    """A file of a run."""
    return Checkpoint(path, path.relative_to(folder).as_posix(), step, fingerprint=str(step))
