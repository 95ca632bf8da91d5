"""lora-forensics: which checkpoint of a LoRA training to keep, and on what evidence.

```python
import lora_forensics as lf

for run in lf.discover_runs("runs/"):
    if isinstance(run, lf.Run):  # else lf.Skipped, with the reason
        measured = lf.measure_run(run, base="model.safetensors")
        verdict = lf.assess_run(measured.layers, measured.checkpoints)
```
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "Run": "lora_forensics.records",
    "Skipped": "lora_forensics.records",
    "discover_runs": "lora_forensics.discovery",
    "measure_run": "lora_forensics.measure",
    "assess_run": "lora_forensics.assess",
    "inspect_file": "lora_forensics.inspection.looking",
}
_MODULES = ("base_model", "turning_point")

__all__ = [
    "Run",
    "Skipped",
    "__version__",
    "assess_run",
    "base_model",
    "discover_runs",
    "inspect_file",
    "measure_run",
    "turning_point",
]

if TYPE_CHECKING:
    from lora_forensics import base_model, turning_point
    from lora_forensics.assess import assess_run
    from lora_forensics.discovery import discover_runs
    from lora_forensics.inspection.looking import inspect_file
    from lora_forensics.measure import measure_run
    from lora_forensics.records import Run, Skipped


def __getattr__(name: str) -> Any:
    """Import on first use, so that `lora-forensics --help` stays instant."""
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    if name in _MODULES:
        return import_module(f"lora_forensics.{name}")
    raise AttributeError(f"module 'lora_forensics' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
