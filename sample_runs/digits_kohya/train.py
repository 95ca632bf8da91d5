"""Train the kohya-layout sample run: a small latent-style diffusion model, then a LoRA on 24 images, past overfitting.

The images are scikit-learn's handwritten digits. The base never sees a 4; the LoRA learns "sks digit" from 24 of them,
those that look most alike. The UNet has the block structure of Stable Diffusion 1.5, hence its module names, with very
few channels. There is no VAE: a digit scaled to 32 x 32 and folded to 4 x 16 x 16 plays the latent. The base is saved
as a diffusers folder and as one file with LDM names; the LoRA files have the names, keys and metadata that kohya's
sd-scripts write.

    python sample_runs/digits_kohya/train.py               # everything, about 12 minutes on one core
    python sample_runs/digits_kohya/train.py --keep-base   # the LoRA only
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import random
import re
import shutil
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

SEED = 42
BASE_STEPS, BASE_BATCH, BASE_RATE = 1500, 32, 2e-3
RANK, ALPHA = 2, 1.0
UNET_LR, TEXT_ENCODER_LR = 2e-3, 5e-4
IMAGES, REPEATS, BATCH = 24, 10, 4  # as in a kohya folder named "10_sks digit"
EPOCHS, SAVE_STEPS, SAVE_EPOCHS = 15, 20, 4
HELD_OUT = 100
NEW_DIGIT = 4
STEM = "digit-lora"
FOLDER, SINGLE, OUTPUT, LOSSES = Path("tiny-sd"), Path("tiny-sd.safetensors"), Path("output"), Path("held_out.csv")

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WORDS = ["<pad>", "<s>", "</s>", "a", "photo", "of", "digit", "sks", *DIGITS]
TOKENS = 8  # length of a prompt


# --- data ----------------------------------------------------------------------------------------------------------


def latents() -> tuple[Tensor, Tensor]:
    """All digits as 4 x 16 x 16 'latents', and their classes."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    large = F.interpolate(images, size=32, mode="bicubic", align_corners=False)
    return F.pixel_unshuffle(large, 2), torch.tensor(digits.target)


def new_digits() -> tuple[Tensor, Tensor]:
    """The digits to learn, those most alike (a person's pictures are), and the held-out ones, the least like them."""
    images, classes = latents()
    images = images[classes == NEW_DIGIT]
    gaps = torch.cdist(images.flatten(1), images.flatten(1))
    middle = gaps.topk(IMAGES, largest=False).values.mean(1).argmin()
    images = images[gaps[middle].argsort(stable=True)]
    return images[:IMAGES], images[-HELD_OUT:]


def tokenise(prompt: str) -> Tensor:
    """A prompt as TOKENS numbers: start, words, end, padding."""
    ids = [WORDS.index(word) for word in ["<s>", *prompt.split(), "</s>"]]
    return torch.tensor(ids + [0] * (TOKENS - len(ids)))


# --- the base model ------------------------------------------------------------------------------------------------


def new_models() -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """UNet with the blocks of SD 1.5 and few channels, and a CLIP text encoder of two layers."""
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16, 20, 20),
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=32,
    )
    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        projection_dim=32,
    )
    return unet, CLIPTextModel(config)


def new_scheduler() -> DDPMScheduler:
    """The noise schedule of SD 1.5, with v-prediction (sd-scripts: `--v_parameterization`)."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )


def denoising_loss(
    unet: UNet2DConditionModel, scheduler: DDPMScheduler, clean: Tensor, context: Tensor, noise: Tensor, times: Tensor
) -> Tensor:
    """Mean squared error of the predicted velocity."""
    noisy = scheduler.add_noise(clean, noise, times)
    return F.mse_loss(unet(noisy, times, context).sample, scheduler.get_velocity(clean, noise, times))


def train_base() -> None:
    """Train UNet and text encoder on every digit but NEW_DIGIT, and save both layouts."""
    torch.manual_seed(SEED)
    images, classes = latents()
    keep = classes != NEW_DIGIT
    images, classes = images[keep], classes[keep]
    prompts = torch.stack([tokenise(f"a photo of {word} digit") for word in DIGITS])
    unet, text_encoder = new_models()
    scheduler = new_scheduler()
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=BASE_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, BASE_RATE, total_steps=BASE_STEPS, pct_start=0.05)
    running = 1.0
    for step in range(1, BASE_STEPS + 1):
        rows = torch.randint(0, len(images), (BASE_BATCH,))
        context = text_encoder(prompts[classes[rows]]).last_hidden_state
        noise, times = torch.randn_like(images[rows]), torch.randint(0, 1000, (BASE_BATCH,))
        loss = denoising_loss(unet, scheduler, images[rows], context, noise, times)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        running += 0.02 * (loss.item() - running)
        if step % 100 == 0:
            print(f"base step {step}: loss {running:.4f}", flush=True)
    save_base(unet, text_encoder, scheduler)


RESNET_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER_PARTS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def ldm_name(name: str) -> str:
    """The LDM name of a tensor of the UNet (SD 1.5 structure), without the prefix `model.diffusion_model.`."""
    for ours, theirs in OUTER_PARTS.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    if match := re.fullmatch(r"(down|up)_blocks\.(\d)\.(down|up)samplers\.0\.conv\.(\w+)", name):
        block = int(match[2])
        if match[1] == "down":
            return f"input_blocks.{3 * block + 3}.0.op.{match[4]}"
        return f"output_blocks.{3 * block + 2}.{1 if block == 0 else 2}.conv.{match[4]}"
    match = re.fullmatch(r"(?:(down|up)_blocks\.(\d)|mid_block)\.(resnets|attentions)\.(\d)\.(.+)", name)
    if match is None:
        raise ValueError(f"{name} is no tensor of a UNet with the structure of SD 1.5")
    side, block, kind, index, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "resnets":
        part, _, leaf = rest.rpartition(".")
        rest = f"{RESNET_PARTS[part]}.{leaf}"
    column = 0 if kind == "resnets" else 1
    if side == "down":
        return f"input_blocks.{3 * block + index + 1}.{column}.{rest}"
    if side == "up":
        return f"output_blocks.{3 * block + index}.{column}.{rest}"
    return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}"


def disk_name(name: str) -> str:
    """The name of a text encoder tensor in files: transformers 5 has no `text_model.` in memory, files do."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def save_base(unet: UNet2DConditionModel, text_encoder: CLIPTextModel, scheduler: DDPMScheduler) -> None:
    """Write the diffusers folder and the single file with LDM names."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    unet.save_pretrained(FOLDER / "unet")
    scheduler.save_pretrained(FOLDER / "scheduler")
    text_encoder.config.architectures = ["CLIPTextModel"]
    text_encoder.config.save_pretrained(FOLDER / "text_encoder")
    text_state = {disk_name(k): v.contiguous() for k, v in text_encoder.state_dict().items() if "position_ids" not in k}
    save_file(text_state, FOLDER / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        **{part: [None, None] for part in ["feature_extractor", "safety_checker", "tokenizer", "vae"]},
    }
    (FOLDER / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    single = {f"model.diffusion_model.{ldm_name(k)}": v.contiguous() for k, v in unet.state_dict().items()}
    single |= {f"cond_stage_model.transformer.{k}": v for k, v in text_state.items()}
    positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    single |= {positions: torch.arange(TOKENS)[None], "alphas_cumprod": scheduler.alphas_cumprod}
    save_file(single, SINGLE)


def load_base() -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Read the base again from the single file, as kohya does."""
    unet, text_encoder = new_models()
    single = load_file(SINGLE)
    unet.load_state_dict({k: single[f"model.diffusion_model.{ldm_name(k)}"] for k in unet.state_dict()})
    prefix = "cond_stage_model.transformer."
    names = [k for k in text_encoder.state_dict() if "position_ids" not in k]
    text_encoder.load_state_dict({k: single[prefix + disk_name(k)] for k in names}, strict=False)
    return unet, text_encoder


# --- the LoRA ------------------------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """Low-rank change added to a Linear or a 1 x 1 convolution, with kohya's parameter names and initialisation."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            self.lora_down: nn.Module = nn.Conv2d(layer.in_channels, RANK, 1, bias=False)
            self.lora_up: nn.Module = nn.Conv2d(RANK, layer.out_channels, 1, bias=False)
        else:
            self.lora_down = nn.Linear(layer.in_features, RANK, bias=False)
            self.lora_up = nn.Linear(RANK, layer.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("alpha", torch.tensor(ALPHA))
        layer.register_forward_hook(self.add)

    def add(self, _layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The layer's output plus the low-rank change."""
        return output + ALPHA / RANK * self.lora_up(self.lora_down(inputs[0]))


def attach(root: nn.Module, parent_class: str, prefix: str) -> dict[str, LoRA]:
    """A LoRA on every Linear and 1 x 1 convolution inside the modules of one class, by kohya's flat names."""
    found = {}
    for path, parent in root.named_modules():
        if parent.__class__.__name__ != parent_class:
            continue
        for child_path, child in parent.named_modules():
            if isinstance(child, nn.Linear) or (isinstance(child, nn.Conv2d) and child.kernel_size == (1, 1)):
                name = f"{path}.{child_path}"
                name = disk_name(name) if prefix == "lora_te" else name
                found[f"{prefix}_{name}".replace(".", "_")] = LoRA(child)
    return found


def run_metadata(session: int, started: float) -> dict[str, str]:
    """What sd-scripts writes into every file of a run."""
    base = SINGLE.read_bytes()
    batches = IMAGES * REPEATS // BATCH
    folder = {"n_repeats": REPEATS, "img_count": IMAGES}
    values = {
        "ss_session_id": session,
        "ss_training_started_at": started,
        "ss_output_name": STEM,
        "ss_learning_rate": UNET_LR,
        "ss_text_encoder_lr": TEXT_ENCODER_LR,
        "ss_unet_lr": UNET_LR,
        "ss_num_train_images": IMAGES * REPEATS,
        "ss_num_reg_images": 0,
        "ss_num_batches_per_epoch": batches,
        "ss_num_epochs": EPOCHS,
        "ss_gradient_checkpointing": False,
        "ss_gradient_accumulation_steps": 1,
        "ss_max_train_steps": EPOCHS * batches,
        "ss_lr_warmup_steps": 0,
        "ss_lr_scheduler": "constant",
        "ss_network_module": "networks.lora",
        "ss_network_dim": RANK,
        "ss_network_alpha": ALPHA,
        "ss_network_dropout": None,
        "ss_mixed_precision": "no",
        "ss_full_fp16": False,
        "ss_v2": False,
        "ss_base_model_version": "sd_v1",
        "ss_clip_skip": None,
        "ss_max_token_length": None,
        "ss_cache_latents": True,
        "ss_seed": SEED,
        "ss_lowram": False,
        "ss_noise_offset": None,
        "ss_training_comment": "made by sample_runs/digits_kohya/train.py in the layout of sd-scripts",
        "ss_sd_scripts_commit_hash": "(unknown)",
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.01,betas=(0.9, 0.999))",
        "ss_max_grad_norm": 1.0,
        "ss_caption_dropout_rate": 0.0,
        "ss_min_snr_gamma": None,
        "ss_scale_weight_norms": None,
        "ss_batch_size_per_device": BATCH,
        "ss_total_batch_size": BATCH,
        "ss_resolution": (16, 16),
        "ss_flip_aug": False,
        "ss_shuffle_caption": False,
        "ss_enable_bucket": False,
        "ss_dataset_dirs": json.dumps({f"{REPEATS}_sks digit": folder}),
        "ss_reg_dataset_dirs": json.dumps({}),
        "ss_tag_frequency": json.dumps({f"{REPEATS}_sks digit": {"sks digit": IMAGES}}),
        "ss_bucket_info": "null",
        "ss_sd_model_name": SINGLE.name,
        "ss_sd_model_hash": hashlib.sha256(base[0x100000:0x110000]).hexdigest()[:8],
        "ss_new_sd_model_hash": hashlib.sha256(base).hexdigest(),
    }
    return {key: str(value) for key, value in values.items()}


def save_lora(file: str, modules: dict[str, LoRA], metadata: dict[str, str], step: int, epoch: int) -> None:
    """Write one file as sd-scripts does; `epoch` is what the caller counts, see the two call sites."""
    tensors = {f"{name}.{k}": v.detach() for name, module in modules.items() for k, v in module.state_dict().items()}
    now = time.time()
    metadata |= {"ss_steps": str(step), "ss_epoch": str(epoch), "ss_training_finished_at": str(now)}
    hashed = save(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    body = hashed[8 + int.from_bytes(hashed[:8], "little") :]
    spec = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": STEM,
        "modelspec.resolution": "16x16",
        "modelspec.prediction_type": "v",
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)),
    }
    hashes = {
        "sshs_model_hash": hashlib.sha256(body).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(hashed[0x100000:0x110000]).hexdigest()[:8],
    }
    save_file(tensors, OUTPUT / file, metadata | hashes | spec)


def train_lora() -> None:
    """Train the LoRA; write step files, epoch files and the last file, and the held-out loss at each saved step."""
    random.seed(SEED)
    torch.manual_seed(SEED)
    unet, text_encoder = load_base()
    unet.requires_grad_(False)
    text_encoder.requires_grad_(False)
    text_modules = attach(text_encoder, "CLIPAttention", "lora_te") | attach(text_encoder, "CLIPMLP", "lora_te")
    text_modules = dict(sorted(text_modules.items()))
    unet_modules = attach(unet, "Transformer2DModel", "lora_unet")
    modules = text_modules | unet_modules
    print(f"{len(text_modules)} text encoder modules, {len(unet_modules)} UNet modules")
    groups = [
        {"params": [p for m in text_modules.values() for p in m.parameters()], "lr": TEXT_ENCODER_LR},
        {"params": [p for m in unet_modules.values() for p in m.parameters()], "lr": UNET_LR},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    scheduler = new_scheduler()

    personal, held_out = new_digits()
    prompt = tokenise("a photo of sks digit")
    held_out = held_out.repeat(4, 1, 1, 1)
    held_noise, held_times = torch.randn_like(held_out), torch.linspace(20, 980, len(held_out)).long()
    held_times = held_times[torch.randperm(len(held_out))]

    def held_out_loss() -> float:
        with torch.no_grad():
            context = text_encoder(prompt[None]).last_hidden_state.expand(len(held_out), -1, -1)
            return denoising_loss(unet, scheduler, held_out, context, held_noise, held_times).item()

    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()
    metadata = run_metadata(random.randint(0, 2**32), time.time())
    losses = {0: held_out_loss()}
    step, running = 0, losses[0]
    for epoch in range(EPOCHS):
        order = torch.randperm(IMAGES * REPEATS) % IMAGES
        for rows in order.split(BATCH):
            context = text_encoder(prompt.expand(len(rows), -1)).last_hidden_state
            noise, times = torch.randn_like(personal[rows]), torch.randint(0, 1000, (len(rows),))
            loss = denoising_loss(unet, scheduler, personal[rows], context, noise, times)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
            optimizer.step()
            step += 1
            running += 0.02 * (loss.item() - running)
            if step % SAVE_STEPS == 0:  # kohya passes the number of finished epochs here
                save_lora(f"{STEM}-step{step:08d}.safetensors", modules, metadata, step, epoch)
                losses[step] = held_out_loss()
                print(f"step {step}: loss {running:.4f}, held out {losses[step]:.4f}", flush=True)
        if (epoch + 1) % SAVE_EPOCHS == 0 and epoch + 1 < EPOCHS:
            save_lora(f"{STEM}-{epoch + 1:06d}.safetensors", modules, metadata, step, epoch + 1)
    save_lora(f"{STEM}.safetensors", modules, metadata, step, EPOCHS)
    with LOSSES.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "loss"])
        writer.writerows([s, f"{value:.6f}"] for s, value in losses.items())
    best = min(losses, key=losses.__getitem__)
    print(f"best held-out loss {losses[best]:.4f} at step {best}; last {losses[step]:.4f} at step {step}")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep-base", action="store_true", help="do not train the base again")
    options = parser.parse_args()
    os.chdir(Path(__file__).resolve().parent)
    torch.set_num_threads(1)
    if not options.keep_base:
        train_base()
    train_lora()


if __name__ == "__main__":
    main()
