"""Weights that stand in the file as they are."""

from lora_forensics.base_model.storage.interface import Storage

STORAGES = (
    Storage(
        "float",
        "float32, float16 and bfloat16 in .safetensors; only the rows that are asked for are read",
        "https://github.com/huggingface/safetensors#format",
    ),
    Storage(
        "pickle",
        ".ckpt, .pt, .pth and .bin of torch, through its weights-only reader: a file that would run code is refused",
        "https://docs.pytorch.org/docs/stable/notes/serialization.html#weights-only",
    ),
)
