"""Sample images from the LoRA's checkpoints, under the names that sd-scripts gives to its samples.

Three lines of a prompt file: the new digit from two seeds, and a digit that the base knew. What overfits shows in the
first two growing alike, and in the third turning into the new digit.

    python sample_runs/digits_kohya/sample.py    # half a minute
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import pixel_shuffle
from train import OUTPUT, SAVE_STEPS, STEM, attach, load_base, new_scheduler, tokenise

PROMPTS = (("a photo of sks digit", 1), ("a photo of sks digit", 2), ("a photo of three digit", 3))
EVERY, LAST, DENOISING_STEPS, SIDE = 4 * SAVE_STEPS, 900, 30, 96
TIME = "20261120233600"
"""Part of the names; fixed, so that the same files come out."""


def main() -> None:
    """Write output/sample."""
    os.chdir(Path(__file__).resolve().parent)
    torch.set_num_threads(1)
    unet, text_encoder = load_base()
    modules = attach(text_encoder, "CLIPAttention", "lora_te") | attach(text_encoder, "CLIPMLP", "lora_te")
    modules |= attach(unet, "Transformer2DModel", "lora_unet")
    scheduler = DDIMScheduler.from_config(new_scheduler().config, clip_sample=False)
    folder = OUTPUT / "sample"
    folder.mkdir(exist_ok=True)
    for step in range(EVERY, LAST + 1, EVERY):
        tensors = load_file(OUTPUT / f"{STEM}-step{step:08d}.safetensors")
        for name, module in modules.items():
            module.load_state_dict({key: tensors[f"{name}.{key}"] for key in module.state_dict()})
        for place, (prompt, seed) in enumerate(PROMPTS):
            with torch.no_grad():
                context = text_encoder(tokenise(prompt)[None]).last_hidden_state
                latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
                scheduler.set_timesteps(DENOISING_STEPS)
                for time in scheduler.timesteps:
                    latent = scheduler.step(unet(latent, time, context).sample, time, latent).prev_sample
            pixels = ((pixel_shuffle(latent, 2)[0, 0].clamp(-1, 1) + 1) * 127.5).byte().numpy()
            image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            image.save(folder / f"{STEM}_{step:06d}_{place:02d}_{TIME}_{seed}.png", optimize=True)


if __name__ == "__main__":
    main()
