"""The study in benchmarks/validity: its step that calls the tool's own code goes along with that code."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from references import dense
from safetensors.torch import save_file

STUDY = Path(__file__).parents[1] / "benchmarks" / "validity"


def test_the_columns_of_a_run_of_the_study_are_those_of_its_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two saves of a linear layer and a convolution, as train.py leaves them."""
    monkeypatch.syspath_prepend(str(STUDY))
    generator = torch.Generator().manual_seed(0)
    shapes = {"linear": ((2, 3, 7), (2, 5, 3), (5, 7)), "conv": ((2, 3, 4, 3, 3), (2, 6, 3, 1, 1), (6, 4, 3, 3))}
    tensors = {
        f"{name}|{part}": torch.randn(shape, generator=generator)
        for name, parts in shapes.items()
        for part, shape in zip("ABW", parts, strict=True)
    }
    save_file(tensors, tmp_path / "run.safetensors")
    log = {name: [1.0, 2.0] for name in ("step", "held_out", "train", "rate", "dose")}
    document = {"setting": {"alpha": 6, "rank": 3}, "seconds": 1.0, "log": log | {"untrained": [3.0]}}
    (tmp_path / "run.json").write_text(json.dumps(document))
    try:
        measured = import_module("columns").measure(tmp_path / "run.safetensors")
    finally:
        sys.modules.pop("columns", None)
    joint = []
    for place, name in enumerate(sorted(shapes)):
        down, up, weight = (
            tensors[f"{name}|{part}"].double().flatten(index) for part, index in zip("ABW", (2, 2, 1), strict=True)
        )
        changes = 2 * up @ down
        joint.append(changes.flatten(1))
        for save, previous in ((0, None), (1, changes[0])):
            for column, value in dense(weight, changes[save], previous).items():
                assert measured.modules[column][save, place] == pytest.approx(value, rel=1e-5, abs=1e-8), column
    whole = torch.cat(joint, dim=1)
    np.testing.assert_allclose(measured.gram, (whole @ whole.T).numpy(), rtol=1e-9)
