"""Frozen base weights: finding and opening them, all their names, and which of them lies below an adapter's module."""

from lora_forensics.base_model.finding import find_base
from lora_forensics.base_model.hashes import check_hash
from lora_forensics.base_model.layouts import BASE_LAYOUTS
from lora_forensics.base_model.model import BaseModel, open_base
from lora_forensics.base_model.resolution import resolve
from lora_forensics.base_model.storage import STORAGES

__all__ = ["BASE_LAYOUTS", "STORAGES", "BaseModel", "check_hash", "find_base", "open_base", "resolve"]
