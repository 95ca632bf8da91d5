"""Which runs are trained: a seeded draw of settings for the main set, and another for the confirmation set."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from families import FAMILIES

MAIN_DOMAINS = {
    "text": ("code", "names", "json", "html"),
    "masked": ("tables", "csv", "xml", "sources"),
    "image": ("inverted", "rotated", "noisy", "shuffled"),
    "diffusion": ("seven", "eight-inverted", "nine-rotated", "six-noisy"),
    "table": ("diabetes", "wine", "cancer", "friedman"),
}
CONFIRMATION_DOMAINS = {
    "text": ("logs", "reversed"),
    "masked": ("mimes", "shouting"),
    "image": ("transposed", "rolled"),
    "diffusion": ("five-rolled", "four-faint"),
    "table": ("waves", "iris"),
}
RANKS = (2, 4, 8, 16, 32)
BATCHES = (1, 4, 8, 16, 30)
SAMPLES = (8, 16, 24, 40, 80)
SCHEDULES = ("constant", "linear", "cosine", "warmup")
OPTIMIZERS = ("adamw", "adamw", "adamw", "sgd", "rmsprop", "lion", "adafactor")
CONFIRMATION_OPTIMIZERS = ("adamw", "adamw", "sgd", "adagrad", "lion")
INITS = ("default", "default", "default", "gaussian", "orthogonal")
RATE_FACTOR = {"adamw": 1.0, "rmsprop": 0.6, "adafactor": 1.0, "lion": 0.3, "sgd": 20.0, "adagrad": 6.0}
"""Learning rates at which the optimisers learn about as fast as AdamW: signs need less, raw gradients more."""
SAVES = 160


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything that makes a run."""

    name: str
    group: str
    """main or confirmation."""
    family: str
    domain: str
    size: str
    rank: int
    alpha: int
    rate: float
    schedule: str
    batch: int
    samples: int
    optimizer: str
    init: str
    steps: int
    save_every: int
    seed: int


RUNS = {"text": 4, "masked": 4, "image": 5, "diffusion": 5, "table": 5}
"""Runs of the main set for each domain; the slow families have fewer."""
LONGEST = {"text": 9, "masked": 12, "image": 10, "diffusion": 20, "table": 20}
"""Most steps between two saves."""


def main_settings(small: bool) -> list[Setting]:
    """Four or five runs for each of the 20 domains, or one."""
    random = np.random.default_rng(20)
    return [
        _draw(random, "main", family, domain, "small", OPTIMIZERS, number)
        for family, domains in MAIN_DOMAINS.items()
        for domain in domains
        for number in range(1 if small else RUNS[family])
    ]


def confirmation_settings(small: bool) -> list[Setting]:
    """New domains, larger models, an optimiser that the main set lacks, other seeds."""
    random = np.random.default_rng(21)
    return [
        _draw(random, "confirmation", family, domain, "large", CONFIRMATION_OPTIMIZERS, number)
        for family, domains in CONFIRMATION_DOMAINS.items()
        for domain in domains
        for number in range(1 if small else 2)
    ]


def _draw(
    random: np.random.Generator,
    group: str,
    family: str,
    domain: str,
    size: str,
    optimizers: tuple[str, ...],
    number: int,
) -> Setting:
    longest = LONGEST[family]
    low, high = FAMILIES[family].rates
    share = float(random.random())
    optimizer = str(random.choice(optimizers))
    rank, samples = int(random.choice(RANKS)), int(random.choice(SAMPLES))
    batch = min(int(random.choice(BATCHES)), samples)
    pace = low * (high / low) ** share
    stretch = (0.6 + 0.8 * float(random.random())) * math.sqrt(samples / 24)
    steps = SAVES * min(max(round(longest * (1 - share) * stretch), 2), longest)
    return Setting(
        name=f"{family}-{domain}-{number}",
        group=group,
        family=family,
        domain=domain,
        size=size,
        rank=rank,
        alpha=rank * int(random.choice([1, 2])),
        rate=pace * RATE_FACTOR[optimizer],
        schedule=str(random.choice(SCHEDULES)),
        batch=batch,
        samples=samples,
        optimizer=optimizer,
        init=str(random.choice(INITS)),
        steps=steps,
        save_every=steps // SAVES,
        seed=int(random.integers(1000)),
    )
