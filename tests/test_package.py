"""The package as a whole: what it imports when, and what it offers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lora_forensics as lf

HEAVY = {"torch", "polars", "scipy", "matplotlib", "diffusers", "numpy", "rich", "transformers", "peft", "safetensors"}
READING = ("assess", "advice", "similarity", "plots", "reports", "series", "turning_point", "records", "errors")


def loaded_after(code: str) -> set[str]:
    """Heavy packages in memory after some code has run in a fresh interpreter."""
    script = f"import sys\n{code}\nprint(*sorted(set(sys.modules) & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def test_importing_the_package_and_its_commands_loads_nothing_heavy() -> None:
    """`lora-forensics --help` has to be instant."""
    assert loaded_after("import lora_forensics, lora_forensics.cli") == set()


@pytest.mark.parametrize("module", READING)
def test_the_reading_half_leaves_torch_alone(module: str) -> None:
    """Said in the docs, held by a lint contract, and true in a fresh interpreter."""
    assert not {"torch", "diffusers", "safetensors", "transformers"} & loaded_after(f"import lora_forensics.{module}")


def test_composing_a_scan_loads_no_torch_before_there_is_work() -> None:
    """A rescan with nothing new has no use for it."""
    assert not {"torch", "scipy", "matplotlib"} & loaded_after("import lora_forensics.scan")


def test_the_library_offers_what_the_contract_names() -> None:
    """The names that scripts import."""
    for name in ("discover_runs", "measure_run", "assess_run", "inspect_file"):
        assert callable(getattr(lf, name))
    for name in ("cs_fluctuation", "valleys", "official_stop"):
        assert callable(getattr(lf.turning_point, name))
    assert callable(lf.base_model.resolve)
    assert set(lf.__all__) <= set(dir(lf))
    with pytest.raises(AttributeError):
        _ = lf.nothing  # type: ignore[attr-defined]


def test_the_package_is_typed() -> None:
    """py.typed is shipped."""
    assert (Path(lf.__file__).parent / "py.typed").exists()
