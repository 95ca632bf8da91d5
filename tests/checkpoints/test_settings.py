"""Settings beside checkpoints: what people and trainers write, and what nobody should."""

from __future__ import annotations

from pathlib import Path

import pytest
from factories import library

from lora_forensics.checkpoints.logs.settings import base_of_card, nested, read_toml, read_yaml


@pytest.mark.parametrize(("text", "rate"), [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("0.0001", 1e-4), ("5E-5", 5e-5)])
def test_rates_are_numbers_however_they_are_written(text: str, rate: float, tmp_path: Path) -> None:
    """YAML 1.1 takes 1e-4 for text."""
    path = tmp_path / "config.yaml"
    path.write_text(f"train: {{lr: {text}, name: 1e-4x}}\n")
    assert read_yaml(path) == {"train": {"lr": rate, "name": "1e-4x"}}


def test_python_objects_in_yaml_are_nothing(tmp_path: Path) -> None:
    """Tuples as accelerate writes them, and calls that nobody should write: the rest is read."""
    yaml = library("yaml")
    path = tmp_path / "hparams.yml"
    path.write_text(
        yaml.dump({"size": (1, 2), "max_train_steps": 20}) + f"x: !!python/object/apply:os.mkdir [{tmp_path}/no]\n"
    )
    assert read_yaml(path) == {"size": None, "max_train_steps": 20, "x": None}
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [", "\x00", "a: &a [*a]\n", "[" * 5000])
def test_what_is_no_mapping_is_empty(text: str, tmp_path: Path) -> None:
    """Never an error; a mapping that holds itself is followed only as far as asked."""
    path = tmp_path / "x"
    path.write_text(text)
    assert nested(read_yaml(path), "b", 0) is None
    assert read_toml(path) == {}
    assert read_toml(tmp_path / "none") == {}


def test_the_base_of_a_model_card(tmp_path: Path) -> None:
    """As one name or as a list; none without a card."""
    assert base_of_card(tmp_path) is None
    for text in ("base_model: org/a\n", 'base_model: "org/a"\n', "base_model:\n- org/a\n"):
        (tmp_path / "README.md").write_text(f"---\nlicense: mit\n{text}---\n")
        assert base_of_card(tmp_path) == "org/a"
