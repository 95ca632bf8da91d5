"""kohya musubi-tuner: the names of sd-scripts for video and image transformers. Facts from musubi-tuner 30c658c."""

from __future__ import annotations

from lora_forensics.checkpoints.interface import Trap
from lora_forensics.checkpoints.kohya import Kohya
from lora_forensics.tensors import SAFETENSORS, Header


class Musubi(Kohya):
    """Files of sd-scripts' names whose metadata counts training items instead of images."""

    name = "musubi"
    about = "kohya musubi-tuner"
    recognised = "the names and keys of kohya, with ss_num_train_items in the metadata"
    traps: tuple[Trap, ...] = (
        Trap("ss_epoch counts finished epochs in step files and from 1 in epoch files: epochs follow from the step"),
        Trap("no hash of the base model is recorded, only its name"),
        Trap("saves were 16-bit until June 2026: rounding noise is larger than in later ones", verified=False),
        Trap(
            "a resumed training counts steps and epochs from 0 again: it cannot be told from a rerun, and is a new run"
        ),
        Trap("with --no_metadata nothing tells it from sd-scripts: it is listed as kohya"),
    )
    samples = "ss_num_train_items"
    suffixes = (SAFETENSORS,)

    def owns(self, header: Header) -> bool:
        """By a key that sd-scripts does not write."""
        return self.samples in header.metadata
