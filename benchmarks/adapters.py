"""What a scan of each adapter kind costs beside a LoRA scan of the same shape, side by side.

    python benchmarks/adapters.py [--repeat 3] [--device cpu] [--threads 1]

Four layers of 1024 x 1024 and one of 4096 x 4096 in bfloat16, 20 checkpoints of rank 8 in float32 that wander. The
kinds take turns, and the best of the repetitions counts, in seconds of processor time: of one thread, unless told
otherwise, for threads that wait for each other are no cost of a kind. The weights are random: the slowest case for the
largest singular value, for nothing stands out of their spectrum.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

import lora_forensics as lf

LAYERS = {f"layers.{n}.self_attn.q_proj": (1024, 1024) for n in range(4)} | {"layers.4.self_attn.q_proj": (4096, 4096)}
CHECKPOINTS = 20
RANK = 8
PREFIX = "base_model.model.model"
BAR = 3.0

Factors = dict[str, torch.Tensor]
Start = Callable[[int, int, torch.Tensor], Factors]


def lora(rows: int, columns: int, weight: torch.Tensor) -> Factors:
    """A pair."""
    return {"lora_A.weight": torch.randn(RANK, columns) / columns**0.5, "lora_B.weight": torch.zeros(rows, RANK)}


def loha(rows: int, columns: int, weight: torch.Tensor) -> Factors:
    """Two pairs."""
    up, down = (rows, RANK), (RANK, columns)
    return {
        "hada_w1_a": torch.randn(up) / 10, "hada_w1_b": torch.randn(down), "hada_w2_a": torch.zeros(up),
        "hada_w2_b": torch.randn(down),
    }  # fmt: skip


def lokr(parts: int) -> Start:
    """A small whole side, and a low-rank one."""

    def start(rows: int, columns: int, weight: torch.Tensor) -> Factors:
        small = min(parts, round(rows**0.5))
        return {
            "lokr_w1": torch.randn(small, small), "lokr_w2_a": torch.randn(rows // small, RANK),
            "lokr_w2_b": torch.zeros(RANK, columns // small),
        }  # fmt: skip

    return start


def lokr_whole(rows: int, columns: int, weight: torch.Tensor) -> Factors:
    """Both sides whole, as near to square as they get."""
    side = round(rows**0.5)
    return {"lokr_w1": torch.randn(side, side), "lokr_w2": torch.zeros(rows // side, columns // side)}


KINDS: dict[str, tuple[dict[str, object], Start]] = {
    "lora": ({"peft_type": "LORA", "lora_alpha": 16}, lora),
    "dora": (
        {"peft_type": "LORA", "lora_alpha": 16},
        lambda r, c, w: {**lora(r, c, w), "lora_magnitude_vector": w.norm(dim=1)},
    ),
    "dora by input": (
        {"peft_type": "LORA", "lora_alpha": 16},
        lambda r, c, w: {**lora(r, c, w), "dora_scale": w.norm(dim=0)[None]},
    ),
    "loha": ({"peft_type": "LOHA", "alpha": 16}, loha),
    "lokr, 4 parts": ({"peft_type": "LOKR", "alpha": 16}, lokr(4)),
    "lokr, 16 parts": ({"peft_type": "LOKR", "alpha": 16}, lokr(16)),
    "lokr, whole": ({"peft_type": "LOKR", "alpha": 16}, lokr_whole),
    "ia3": ({"peft_type": "IA3"}, lambda r, c, w: {"ia3_l": torch.ones(r, 1)}),
    "ia3 by input": ({"peft_type": "IA3"}, lambda r, c, w: {"ia3_l": torch.ones(1, c)}),
}


def write(root: Path) -> None:
    """The base, and a run of each kind."""
    torch.manual_seed(0)
    base = {name: (torch.randn(shape) / shape[1] ** 0.5).bfloat16() for name, shape in LAYERS.items()}
    (root / "base").mkdir()
    embedding = {"model.embed_tokens.weight": torch.randn(64, 1024)}
    save_file({f"model.{n}.weight": w for n, w in base.items()} | embedding, root / "base" / "model.safetensors")
    for kind, (config, start) in KINDS.items():
        state = {
            f"{PREFIX}.{name}.{role}": tensor
            for name, weight in base.items()
            for role, tensor in start(*weight.shape, weight.float()).items()
        }
        for step in range(10, 10 * CHECKPOINTS + 1, 10):
            folder = root / kind / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            state = {name: tensor + 1e-3 * torch.randn_like(tensor) for name, tensor in state.items()}
            save_file(state, folder / "adapter_model.safetensors")
            (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, **config}))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root)
        runs = {kind: next(run for run in lf.discover_runs(root / kind) if isinstance(run, lf.Run)) for kind in KINDS}
        for _ in range(options.repeat):
            for kind, run in runs.items():
                start = time.process_time()
                layers = lf.measure_run(run, base=root / "base", device=options.device).layers
                best[kind] = min(best.get(kind, float("inf")), time.process_time() - start)
                assert len(layers) == CHECKPOINTS * len(LAYERS), kind
                assert not layers["cosine"].null_count(), kind
    print(f"{'kind':<16} {'seconds':>8} {'of a LoRA scan':>15}")
    for kind, seconds in best.items():
        ratio = seconds / best["lora"]
        print(f"{kind:<16} {seconds:8.2f} {ratio:15.2f}{'' if ratio <= BAR else '  above the bar'}")


if __name__ == "__main__":
    main()
