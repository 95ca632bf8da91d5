"""lora-forensics: which LoRA checkpoint to keep."""

__version__ = "0.1.0"
