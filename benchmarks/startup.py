"""What every call costs before it does anything: help, a scan with nothing new, a listing of many files.

    python benchmarks/startup.py [--repeat 5] [--json FILE]

Each command is a process of its own; the best of the repetitions counts, in wall seconds. `--help` stands beside that
of a click program that does nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

BARE = """
import click

@click.group()
def main():
    "Nothing."

main()
"""
CHECKPOINTS = 500
ADAPTERS, OTHERS = 2000, 8000


def seconds(command: list[str], folder: Path, repeat: int) -> float:
    """The best wall time."""
    best = float("inf")
    for _ in range(repeat):
        begin = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        best = min(best, time.perf_counter() - begin)
    return best


def write_run(root: Path) -> None:
    """500 checkpoints of four small layers, and their base."""
    names = [f"layers.{n}.self_attn.{name}_proj" for n in range(2) for name in "qv"]
    (root / "base").mkdir(parents=True)
    frozen = {f"model.{name}.weight": torch.randn(64, 64) for name in names}
    save_file({**frozen, "model.embed_tokens.weight": torch.randn(64, 64)}, root / "base" / "model.safetensors")
    state = {}
    for name in names:
        state[f"base_model.model.model.{name}.lora_A.weight"] = torch.randn(4, 64)
        state[f"base_model.model.model.{name}.lora_B.weight"] = torch.randn(64, 4)
    for step in range(10, 10 * CHECKPOINTS + 1, 10):
        folder = root / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        state = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in state.items()}
        save_file(state, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 4}')


def write_files(root: Path) -> None:
    """2,000 LoRA files with the names of an SD1.5 UNet, headers of true length, among 8,000 others."""
    state = {}
    for n in range(192):
        name = f"lora_unet_down_blocks_{n // 48}_attentions_{n % 2}_transformer_blocks_{n}_attn1_to_q"
        state[f"{name}.lora_down.weight"] = torch.zeros(1, 4)
        state[f"{name}.lora_up.weight"] = torch.zeros(4, 1)
        state[f"{name}.alpha"] = torch.tensor(1.0)
    for run in range(ADAPTERS // 20):
        (root / f"run{run}").mkdir(parents=True)
        for step in range(20):
            save_file(state, root / f"run{run}" / f"run{run}-{step + 1:06d}.safetensors")
    (root / "images").mkdir()
    for n in range(OTHERS):
        (root / "images" / f"{n}.png").write_bytes(b"png")


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ours = ["-m", "lora_forensics"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "bare.py").write_text(BARE)
        write_run(folder / "one")
        write_files(folder / "many")
        scan = [*ours, "scan", "one/run", "--base", "one/base", "--out", "out", "--quiet"]
        bare = seconds(["bare.py", "--help"], folder, options.repeat)
        found = {
            "a bare click program's --help": bare,
            "--help": seconds([*ours, "--help"], folder, options.repeat),
            f"scan of {CHECKPOINTS} checkpoints": seconds(scan, folder, 1),
            "the same again, nothing new": seconds(scan, folder, options.repeat),
            f"runs on {ADAPTERS + OTHERS} files": seconds([*ours, "runs", "many"], folder, options.repeat),
        }
    for what, took in found.items():
        print(f"{what:<36}{took:7.2f} s")
    print(f"--help takes {found['--help'] / bare:.2f} times a bare click program's")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
