"""What a scan costs beside the official code's way, PEFT's own deltas, and what the machine can do at all.

    python benchmarks/speed.py [--case NAME]... [--repeat 3] [--device cpu] [--json FILE] [--skip-growth]

Every case is a base in bfloat16 and checkpoints in float32 that wander, with the shapes of a real model. Its sides take
turns, and the best of the repetitions counts, in wall seconds:

- ours: `measure_run`, files to tables
- official: for a layer and a checkpoint `B @ A`, then `cosine_similarity` with W, all in float32 memory already; over a
  few checkpoints, and multiplied up; in a process of its own, as its users run it
- peft: the same with `get_delta_weight` of its own layer
- kept: the official way in this process, whose allocator keeps what is freed (`stacking.keep_freed_memory`): a part of
  what makes ours fast is to be had with one line in the official code, too
- floor: the longer of reading all files once, and of the products that nothing can avoid (W @ A^T of all checkpoints of
  a chunk in float32, the Grams of neighbours in float64)

Growth: one layer at 10 to 500 checkpoints, each in a process of its own, with that process' peak memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity

import lora_forensics as lf
from lora_forensics.moments import full_precision, low_rank

Shape = tuple[int, int]
PREFIX = "base_model.model.model."
SAMPLE = 2
"""Checkpoints that the slow sides are timed on."""
GROWTH = (10, 50, 200, 500)
ERROR_BAR = 2e-8


def attention(width: int, context: int | None = None) -> dict[str, Shape]:
    """Projections of an attention; keys and values may come from a text."""
    source = context or width
    return {"q_proj": (width, width), "k_proj": (width, source), "v_proj": (width, source), "o_proj": (width, width)}


def block(width: int, context: int) -> dict[str, Shape]:
    """A transformer block of a diffusion UNet: two attentions and a gated feed-forward."""
    inner = {f"attn1.{name}": shape for name, shape in attention(width).items()}
    inner |= {f"attn2.{name}": shape for name, shape in attention(width, context).items()}
    return inner | {"ff.net.0.proj": (8 * width, width), "ff.net.2": (width, 4 * width)}


def several(**parts: tuple[int, dict[str, Shape]]) -> dict[str, Shape]:
    """So many copies of each part."""
    return {
        f"layers.{part}{n}.{name}": shape
        for part, (number, shapes) in parts.items()
        for n in range(number)
        for name, shape in shapes.items()
    }


CLIP = attention(768) | {"mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
FLUX = attention(3072) | {"ff.net.0.proj": (12288, 3072), "ff.net.2": (3072, 12288)}
MLP = {"gate_proj": (11008, 4096), "up_proj": (11008, 4096), "down_proj": (4096, 11008)}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    layers: dict[str, Shape]
    rank: int
    checkpoints: int = 100
    speedup: float | None = None
    """Bar: at least so many times faster than the official way."""
    floor: float | None = None
    """Bar: at most so many times the floor."""
    dtype: torch.dtype = torch.float32
    """What the checkpoints are stored in."""
    asked: bool = False
    """Only measured when it is asked for by name."""


SD15 = {"a": (5, block(320, 768)), "b": (5, block(640, 768)), "c": (6, block(1280, 768)), "te": (12, CLIP)}
FEW = {"a": (1, block(320, 768)), "c": (1, block(1280, 768)), "te": (1, CLIP)}
LLAMA = several(a=(1, attention(4096)))
CASES = {
    "sd15 r4 all layers": Case(several(**SD15), 4),
    "sd15 r32": Case(several(**FEW), 32),
    "sd15 r128": Case(several(**FEW), 128, 50),
    "sdxl r32": Case(several(a=(1, block(640, 2048)), b=(1, block(1280, 2048))), 32, 50),
    "sdxl r32 all layers": Case(
        several(a=(10, block(640, 2048)), b=(60, block(1280, 2048))), 32, 20, dtype=torch.bfloat16, asked=True
    ),
    "flux r16": Case(several(a=(1, FLUX)), 16, 50),
    "llama attention r8": Case(LLAMA, 8, 100, 10, 1.2),
    "llama attention r16": Case(LLAMA, 16, 100, 10, 1.2),
    "llama attention r64": Case(LLAMA, 64, 100, 4, 1.2),
    "llama attention r128": Case(LLAMA, 128, 100, 2.5, 1.2),
    "llama mlp r8": Case(several(a=(1, MLP)), 8, 100, 10, 1.2),
    "llama mlp r64": Case(several(a=(1, MLP)), 64, 100, 4, 1.2),
}


def write(root: Path, case: Case, checkpoints: int) -> lf.Run:
    """The base and a run."""
    torch.manual_seed(0)
    base = {f"model.{name}.weight": (torch.randn(s) / s[1] ** 0.5).bfloat16() for name, s in case.layers.items()}
    (root / "base").mkdir()
    save_file({**base, "model.embed_tokens.weight": torch.randn(64, 64)}, root / "base" / "model.safetensors")
    state = {}
    for name, (rows, columns) in case.layers.items():
        state[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(case.rank, columns) / columns**0.5
        state[f"{PREFIX}{name}.lora_B.weight"] = 1e-2 * torch.randn(rows, case.rank)
    for step in range(10, 10 * checkpoints + 1, 10):
        folder = root / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for tensor in state.values():  # a few rows of each: random numbers take longer than the scan
            part = tensor[: max(1, len(tensor) // 16)]
            part += 1e-3 * torch.randn_like(part)
        stored = {name: tensor.to(case.dtype) for name, tensor in state.items()}
        save_file(stored, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": case.rank, "lora_alpha": case.rank})
        )
    return next(run for run in lf.discover_runs(root / "run") if isinstance(run, lf.Run))


def synchronized(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


class Sides:
    """The sides of one case; each gives seconds for all checkpoints."""

    def __init__(self, case: Case, root: Path, run: lf.Run, device: str) -> None:
        self.case, self.root, self.run, self.device = case, root, run, device
        frozen = load_file(root / "base" / "model.safetensors")
        self.weights = {name: frozen[f"model.{name}.weight"].float().to(device) for name in case.layers}
        self.count = len(run.checkpoints)
        self.spectra = 0.0
        self.error = 0.0

    def factors(self, index: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A and B of every layer."""
        state = load_file(self.run.checkpoints[index].path)
        keys = {name: (f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight") for name in self.weights}
        return {
            name: (state[a].float().to(self.device), state[b].float().to(self.device)) for name, (a, b) in keys.items()
        }

    def ours(self) -> float:
        """The whole of it; also keeps what of it singular values took, and the largest error of a few cosines."""
        plain, spent = low_rank.core_singular_values, [0.0]

        def timed(*grams: torch.Tensor) -> torch.Tensor:
            begin = time.perf_counter()
            found = plain(*grams)
            spent[0] += time.perf_counter() - begin
            return found

        low_rank.core_singular_values = timed
        begin = time.perf_counter()
        layers = lf.measure_run(self.run, self.root / "base", self.device).layers
        seconds = time.perf_counter() - begin
        low_rank.core_singular_values = plain
        self.spectra = spent[0] / (seconds - spent[0])
        if not self.error:
            self.error = self.compare(layers)
        return seconds

    def compare(self, layers: Any) -> float:
        """The largest difference to cosines in float64."""
        name = next(iter(self.weights))
        weight = self.weights[name].double()
        worst = 0.0
        for index in (0, self.count - 1):
            a, b = (factor.double() for factor in self.factors(index)[name])
            delta = b @ a
            expected = float((delta * weight).sum() / delta.norm() / weight.norm())
            rows = layers.filter(
                (layers["checkpoint"] == self.run.checkpoints[index].name) & (layers["module"].str.ends_with(name))
            )
            worst = max(worst, abs(rows["cosine"][0] - expected))
        return worst

    def dense(self, deltas: Callable[[dict[str, tuple[torch.Tensor, torch.Tensor]]], Any]) -> float:
        """Deltas and cosines of a few checkpoints, for all."""
        seconds = 0.0
        for index in range(SAMPLE):
            factors = self.factors(index)
            make = deltas(factors)
            synchronized(self.device)
            begin = time.perf_counter()
            for name, weight in self.weights.items():
                cosine_similarity(make(name).flatten(), weight.flatten(), dim=0).item()
            seconds += time.perf_counter() - begin
        return seconds * self.count / SAMPLE

    def alone(self, side: str) -> float:
        """A side in a process of its own."""
        name = next(name for name, case in CASES.items() if case is self.case)
        command = [sys.executable, __file__, "--side", side, name, str(self.root), "--device", self.device]
        return float(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)

    def official(self) -> float:
        """`B @ A`, then the cosine, as its users run it."""
        return self.alone("direct")

    def peft(self) -> float:
        """PEFT's own delta, then the cosine, as its users run it."""
        return self.alone("merging")

    def direct(self) -> float:
        """`B @ A`, then the cosine, in this process."""
        with torch.no_grad():
            return self.dense(lambda factors: lambda name: torch.matmul(factors[name][1], factors[name][0]))

    def merging(self) -> float:
        """PEFT's own delta, then the cosine, in this process."""
        from peft.tuners.lora import LoraConfig
        from peft.tuners.lora.layer import Linear

        def deltas(factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Callable[[str], torch.Tensor]:
            layers = {}
            for name, (a, b) in factors.items():
                plain = torch.nn.Linear(a.shape[1], b.shape[0], bias=False, device="meta")
                config = LoraConfig(r=len(a), lora_alpha=len(a))
                layer = Linear(plain, "default", config=config, r=len(a), lora_alpha=len(a))
                layer.lora_A["default"].weight = torch.nn.Parameter(a)
                layer.lora_B["default"].weight = torch.nn.Parameter(b)
                layers[name] = layer
            return lambda name: layers[name].get_delta_weight("default")

        with torch.no_grad():
            return self.dense(deltas)

    def read(self) -> float:
        """All files, once and in order."""
        buffer = memoryview(bytearray(1 << 24))
        begin = time.perf_counter()
        for path in [*(self.root / "base").iterdir(), *(checkpoint.path for checkpoint in self.run.checkpoints)]:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        return time.perf_counter() - begin

    def products(self) -> float:
        """W @ A^T, the Grams of all factors and those with the neighbour's, and B (A A^T) by rows."""
        seconds = 0.0
        width = min(self.count, 50)
        wide = torch.float64
        with torch.no_grad(), full_precision():
            for name, (a, b) in self.factors(0).items():
                stacked = a.repeat(width, 1)
                downs, ups = (t.to(wide).expand(width, *t.shape).contiguous() for t in (a.mT, b))
                synchronized(self.device)
                begin = time.perf_counter()
                self.weights[name] @ stacked.mT
                for factor in (downs, ups):
                    gram = factor.mT @ factor
                    factor[1:].mT @ factor[:-1]
                ups @ gram
                synchronized(self.device)
                seconds += time.perf_counter() - begin
        return seconds * self.count / width

    def transfer(self) -> float:
        """Base and factors over the bus from pinned memory; 0 without a device."""
        if not self.device.startswith("cuda"):
            return 0.0
        pinned = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
        pinned.to(self.device)
        synchronized(self.device)
        begin = time.perf_counter()
        pinned.to(self.device, non_blocking=True)
        synchronized(self.device)
        rate = len(pinned) / (time.perf_counter() - begin)
        return (
            sum(c.size for c in self.run.checkpoints) / rate + sum(w.numel() for w in self.weights.values()) * 2 / rate
        )


def measure(case: Case, repeat: int, device: str) -> dict[str, float]:
    """The best of every side."""
    with tempfile.TemporaryDirectory() as folder:
        run = write(Path(folder), case, case.checkpoints)
        sides = Sides(case, Path(folder), run, device)
        best: dict[str, float] = {}
        for _ in range(repeat):
            for side in ("read", "products", "transfer", "ours", "official", "peft", "direct"):
                seconds = getattr(sides, side)()
                best[side] = min(best.get(side, float("inf")), seconds)
            best["spectra"] = min(best.get("spectra", float("inf")), sides.spectra)
        floor = max(best["read"], best["products"], best["transfer"])
        return {
            **best,
            "checkpoints": case.checkpoints,
            "of_floor": best["ours"] / floor,
            "over_official": best["official"] / best["ours"],
            "over_peft": best["peft"] / best["ours"],
            "over_direct": best["direct"] / best["ours"],
            "error": sides.error,
        }


def growth(device: str) -> list[dict[str, float]]:
    """Seconds and peak memory by number of checkpoints, and of a process that measures nothing."""
    found = []
    case = Case(several(a=(2, {"q_proj": (4096, 4096)})), 16)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), case, max(GROWTH))
        for count in GROWTH:
            command = [sys.executable, __file__, "--child", folder, str(count), "--device", device]
            seconds, peak = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.split()
            found.append({"checkpoints": count, "seconds": float(seconds), "peak_bytes": int(peak)})
    return found


def child(folder: Path, count: int, device: str) -> None:
    """Measure the first checkpoints of a run and print the seconds."""
    from dataclasses import replace

    run = next(run for run in lf.discover_runs(folder / "run") if isinstance(run, lf.Run))
    run = replace(run, checkpoints=run.checkpoints[:count])
    torch.ones(64, 64) @ torch.ones(64, 64)
    begin = time.perf_counter()
    lf.measure_run(run, folder / "base", device)
    seconds = time.perf_counter() - begin
    # not getrusage: what a child reports there starts with the size of its parent
    status = Path("/proc/self/status").read_text()
    print(seconds, next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")))


def main() -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="only these (repeatable)")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--skip-growth", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side, name, folder = options.side
        run = next(run for run in lf.discover_runs(Path(folder) / "run") if isinstance(run, lf.Run))
        print(getattr(Sides(CASES[name], Path(folder), run, options.device), side)())
        return
    if options.child:
        child(Path(options.child[0]), int(options.child[1]), options.device)
        return
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "cases": {},
    }
    print(f"{'case':<22}{'read':>7}{'product':>9}{'ours':>8}{'of floor':>10}{'official':>10}{'times':>7}"
          f"{'peft':>8}{'times':>7}{'kept':>7}{'times':>7}{'spectra':>9}{'error':>9}")  # fmt: skip
    for name in options.case or [name for name, case in CASES.items() if not case.asked]:
        case = CASES[name]
        row = measure(case, options.repeat, options.device)
        result["cases"][name] = row
        missed = [
            text
            for text, ok in (
                (f"floor {case.floor}", case.floor is None or row["of_floor"] <= case.floor),
                (f"official {case.speedup}", case.speedup is None or row["over_official"] >= case.speedup),
                ("spectra 0.3", case.floor is None or row["spectra"] <= 0.3),
                (f"error {ERROR_BAR}", row["error"] <= ERROR_BAR),
            )
            if not ok
        ]
        print(f"{name:<22}{row['read']:7.2f}{row['products']:9.2f}{row['ours']:8.2f}{row['of_floor']:10.2f}"
              f"{row['official']:10.1f}{row['over_official']:7.1f}{row['peft']:8.1f}{row['over_peft']:7.1f}"
              f"{row['direct']:7.1f}{row['over_direct']:7.1f}"
              f"{row['spectra']:9.0%}{row['error']:9.0e}{'  misses ' + ', '.join(missed) if missed else ''}",
              flush=True)  # fmt: skip
    if not options.skip_growth:
        result["growth"] = growth(options.device)
        print(f"\n{'checkpoints':<14}{'seconds':>9}{'each, ms':>10}{'peak, MB':>10}")
        for point in result["growth"]:
            each = 1e3 * point["seconds"] / point["checkpoints"]
            print(f"{point['checkpoints']:<14}{point['seconds']:9.2f}{each:10.1f}{point['peak_bytes'] / 1e6:10.0f}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
