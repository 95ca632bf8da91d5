"""Five families of small models: how each is built, taught its base, and given personal and held-out samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from data import ALTERED, MASK, SUBJECTS, VOCABULARY, base_text, chunks, digits, encode, negated, table
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, ...]
Loss = Callable[[nn.Module, Batch, torch.Generator], Tensor]

LENGTH = 48
"""Characters of a text sample."""


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of model and task."""

    name: str
    build: Callable[[str, str], nn.Module]
    """Size and domain to a new model."""
    base: Callable[[str], Batch]
    """Domain to what the base model learns."""
    personal: Callable[[str, int, int], tuple[Batch, Batch]]
    """Domain, seed and number of samples to training and held-out tensors."""
    loss: Loss
    targets: tuple[str, ...]
    """Layers that get an adapter."""
    base_steps: int
    rates: tuple[float, float]
    """Range of AdamW's learning rate."""
    shared_base: bool = True
    """One base model for all domains."""
    base_rate: float = 3e-3
    """Highest learning rate while the base is taught."""
    base_clip: float = math.inf
    """Largest norm of the gradient while the base is taught."""


def build_llama(size: str, _domain: str) -> nn.Module:
    """A character-level Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, depth = (48, 2) if size == "small" else (96, 3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def build_bert(size: str, _domain: str) -> nn.Module:
    """A character-level ModernBERT."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    width, depth = (48, 2) if size == "small" else (96, 3)
    config = ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width // 3,
        num_hidden_layers=depth,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        local_attention=16,
        global_attn_every_n_layers=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        attn_implementation="eager",
    )
    return ModernBertForMaskedLM(config)


def build_vit(size: str, _domain: str) -> nn.Module:
    """A vision transformer for 8 x 8 pictures."""
    from transformers import ViTConfig, ViTForImageClassification

    width, depth = (48, 2) if size == "small" else (96, 3)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    return ViTForImageClassification(config)


class Denoiser(nn.Module):
    """Predicts the noise in a picture: convolutions around a fully connected middle that sees all of it."""

    def __init__(self, channels: int, width: int) -> None:
        """So many channels at the edges and units in the middle."""
        super().__init__()
        self.time = nn.Linear(16, channels)
        self.conv_in = nn.Conv2d(1, channels, 3, padding=1)
        self.conv_mid = nn.Conv2d(channels, channels, 3, padding=1)
        self.down = nn.Linear(channels * 64, width)
        self.middle = nn.Linear(width, width)
        self.up = nn.Linear(width, channels * 64)
        self.conv_out = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, pictures: Tensor, level: Tensor) -> Tensor:
        """Noise in pictures (n, 1, 8, 8) at noise levels (n,)."""
        angles = level[:, None] * torch.arange(1, 9)
        hidden = self.conv_in(pictures)
        hidden = F.silu(hidden + self.time(torch.cat([angles.sin(), angles.cos()], dim=1))[:, :, None, None])
        hidden = F.silu(self.conv_mid(hidden))
        middle = F.silu(self.middle(F.silu(self.down(hidden.flatten(1)))))
        return self.conv_out(F.silu(hidden + self.up(middle).view_as(hidden)))


def build_denoiser(size: str, _domain: str) -> nn.Module:
    """A small diffusion denoiser."""
    return Denoiser(8, 64) if size == "small" else Denoiser(12, 128)


def build_mlp(size: str, domain: str) -> nn.Module:
    """A regression network for one table."""
    columns, width = table(domain)[0].shape[1], 48 if size == "small" else 128
    layers = [("first", columns, width), ("second", width, width), ("third", width, width), ("last", width, 1)]
    model = nn.Sequential()
    for name, inputs, outputs in layers:
        model.add_module(name, nn.Linear(inputs, outputs))
        if name != "last":
            model.add_module(f"{name}_act", nn.GELU())
    return model


def text_loss(model: nn.Module, batch: Batch, _random: torch.Generator) -> Tensor:
    """Mean negative log likelihood of the next character."""
    logits = model(batch[0]).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten())


def masked_loss(model: nn.Module, batch: Batch, random: torch.Generator) -> Tensor:
    """Mean negative log likelihood of the characters under a random mask of 20 %."""
    symbols = batch[0]
    hidden = torch.rand(symbols.shape, generator=random) < 0.2
    logits = model(symbols.masked_fill(hidden, MASK)).logits
    return F.cross_entropy(logits[hidden], symbols[hidden])


def class_loss(model: nn.Module, batch: Batch, _random: torch.Generator) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(model(batch[0]).logits, batch[1])


def noise_loss(model: nn.Module, batch: Batch, random: torch.Generator) -> Tensor:
    """Squared error of the predicted noise at random noise levels."""
    pictures = batch[0]
    level = torch.rand(len(pictures), generator=random) * 1.05 + 0.4
    noise = torch.randn(pictures.shape, generator=random)
    mixed = level.cos()[:, None, None, None] * pictures + level.sin()[:, None, None, None] * noise
    return F.mse_loss(model(mixed, level), noise)


def table_loss(model: nn.Module, batch: Batch, _random: torch.Generator) -> Tensor:
    """Squared error."""
    return F.mse_loss(model(batch[0]), batch[1])


def base_chunks(_domain: str) -> Batch:
    """The documentation in pieces."""
    symbols = encode(base_text())
    return (torch.from_numpy(symbols[: len(symbols) // LENGTH * LENGTH].reshape(-1, LENGTH)),)


def personal_chunks(domain: str, seed: int, samples: int) -> tuple[Batch, Batch]:
    """Pieces of a text domain."""
    own, others = chunks(domain, LENGTH, seed, samples, 40)
    return (torch.from_numpy(own),), (torch.from_numpy(others),)


def base_digits(_domain: str) -> Batch:
    """The first 900 digits, upright."""
    images, kinds = digits()
    return torch.from_numpy(images[:900, None]), torch.from_numpy(kinds[:900])


def personal_digits(domain: str, seed: int, samples: int) -> tuple[Batch, Batch]:
    """Digits that the base has not seen, altered."""
    images, kinds = digits()
    order = 900 + np.random.default_rng(seed).permutation(len(images) - 900)
    altered = torch.from_numpy(np.ascontiguousarray(ALTERED[domain](images))[:, None])
    labels = torch.from_numpy(kinds)
    own, others = order[:samples], order[samples : samples + 200]
    return (altered[own], labels[own]), (altered[others], labels[others])


def base_pictures(_domain: str) -> Batch:
    """The digits 0 to 3 as pictures, in every style that a subject may have."""
    images, kinds = digits()
    shown = images[kinds < 4]
    styles = [np.ascontiguousarray(alter(shown)) for _, alter in SUBJECTS.values()]
    return (torch.from_numpy(np.concatenate(styles)[:, None]) * 2 - 1,)


def personal_pictures(domain: str, seed: int, samples: int) -> tuple[Batch, Batch]:
    """Pictures of one subject; held-out ones four times, since noise is drawn for each."""
    kind, alter = SUBJECTS[domain]
    images, kinds = digits()
    altered = torch.from_numpy(np.ascontiguousarray(alter(images[kinds == kind]))[:, None]) * 2 - 1
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(altered)))
    return (altered[order[:samples]],), (altered[order[samples : samples + 80]].repeat(3, 1, 1, 1),)


def base_rows(domain: str) -> Batch:
    """The first half of a table."""
    x, y = table(domain)
    order = np.random.default_rng(19).permutation(len(x))[: len(x) // 2]
    return torch.from_numpy(x[order]), torch.from_numpy(y[order])


def personal_rows(domain: str, seed: int, samples: int) -> tuple[Batch, Batch]:
    """Rows of the second half, shifted."""
    x, y = table(domain)
    rest = np.random.default_rng(19).permutation(len(x))[len(x) // 2 :]
    rest = np.random.default_rng(seed).permutation(rest)
    samples = min(samples, len(rest) // 2)
    x = negated(x)
    own, others = rest[:samples], rest[samples:]
    return (torch.from_numpy(x[own]), torch.from_numpy(y[own])), (
        torch.from_numpy(x[others]),
        torch.from_numpy(y[others]),
    )


LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BERT = ("Wqkv", "Wo", "Wi")
VIT = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
CONV = ("conv_in", "conv_mid", "down", "middle", "up", "conv_out", "time")
MLP = ("first", "second", "third")

FAMILIES: dict[str, Family] = {
    "text": Family("text", build_llama, base_chunks, personal_chunks, text_loss, LLAMA, 800, (8e-4, 1.6e-2)),
    "masked": Family(
        "masked",
        build_bert,
        base_chunks,
        personal_chunks,
        masked_loss,
        BERT,
        1000,
        (8e-4, 1.6e-2),
        base_rate=6e-3,
        base_clip=1.0,
    ),
    "image": Family("image", build_vit, base_digits, personal_digits, class_loss, VIT, 400, (5e-4, 1.6e-2)),
    "diffusion": Family(
        "diffusion", build_denoiser, base_pictures, personal_pictures, noise_loss, CONV, 3000, (1e-3, 2e-2)
    ),
    "table": Family("table", build_mlp, base_rows, personal_rows, table_loss, MLP, 300, (6e-4, 2e-2), False),
}
"""Every family by name."""
