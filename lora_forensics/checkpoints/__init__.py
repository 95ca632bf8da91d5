"""Trainers: how each lays out the checkpoints of a run, and what it left about them.

A new trainer is one module here with a class that follows `interface.Trainer`, and one line in `TRAINERS`.
"""

from __future__ import annotations

from lora_forensics.checkpoints.ai_toolkit import AiToolkit
from lora_forensics.checkpoints.diffsynth import DiffSynth
from lora_forensics.checkpoints.diffusers import Diffusers
from lora_forensics.checkpoints.diffusion_pipe import DiffusionPipe
from lora_forensics.checkpoints.interface import Folder, Trainer, Trap
from lora_forensics.checkpoints.kohya import Kohya
from lora_forensics.checkpoints.llama_factory import LlamaFactory
from lora_forensics.checkpoints.mlx_lm import MlxLm
from lora_forensics.checkpoints.musubi import Musubi
from lora_forensics.checkpoints.nemo import Automodel, NeMo
from lora_forensics.checkpoints.onetrainer import OneTrainer
from lora_forensics.checkpoints.peft import PeftTrainer
from lora_forensics.checkpoints.simpletuner import SimpleTuner
from lora_forensics.checkpoints.swift import Swift
from lora_forensics.checkpoints.torchtune import Torchtune

__all__ = ["TRAINERS", "Folder", "Trainer", "Trap"]

_ORDER: tuple[Trainer, ...] = (
    OneTrainer(),
    DiffusionPipe(),
    SimpleTuner(),
    Diffusers(),
    AiToolkit(),
    DiffSynth(),
    Torchtune(),
    NeMo(),
    Automodel(),
    MlxLm(),
    LlamaFactory(),
    Swift(),
    Musubi(),
    PeftTrainer(),
    Kohya(),
)

TRAINERS: dict[str, Trainer] = {trainer.name: trainer for trainer in _ORDER}
"""Every trainer by name; the order is the precedence, most specific first."""
