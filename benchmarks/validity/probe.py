"""How few evaluations `probe` needs: the tool's search against every checkpoint, on runs of the study.

python benchmarks/validity/probe.py [--work DIR] [--jobs N]

Prints a section of docs/validity.md and writes it there.

One run of each of the study's 20 domains and of its 10 fresh ones, and 10 more of these, are trained. Every fourth save
is evaluated on each of 40 held-out samples by itself. A draw takes four of them; the search sees their loss at the
checkpoints that it asks for, and its regret is counted on all held-out data of the run. Then the sample run
`text_peft`: draws of four of its 80 held-out texts, against its best checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402 - the number of threads comes first
from numpy.typing import NDArray  # noqa: E402

from lora_forensics.detectors import half_of_path  # noqa: E402
from lora_forensics.evidence import movement  # noqa: E402
from lora_forensics.probe.search import Search  # noqa: E402
from lora_forensics.probed import difference  # noqa: E402
from lora_forensics.turning_point import cs_fluctuation, valleys  # noqa: E402

Floats = NDArray[np.float64]
HORIZONS = (1.0, 0.5, 0.25)
STRIDE = 4
SAMPLES, SIZE, DRAWS = 40, 4, 20
"""Held-out samples that are evaluated, how many of them a draw has, and draws of each run and horizon."""
REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "validity.md"
TITLE = "## `probe`: a few evaluations\n"


@dataclass(frozen=True, slots=True)
class Curves:
    """A run, or its first part."""

    name: str
    losses: Floats
    """(saves, samples)"""
    held_out: Floats
    """(saves,) on all held-out data."""
    untrained: float
    moved: Floats
    """(saves,) way of the weights since the save before."""
    cosine: Floats
    """(saves,) CS."""

    def first(self, share: float) -> Curves:
        """The first part of the run."""
        stop = int(len(self.held_out) * share)
        parts = (values[:stop] for values in (self.losses, self.held_out, self.moved, self.cosine))
        losses, held_out, moved, cosine = parts
        return Curves(self.name, losses, held_out, self.untrained, moved, cosine)

    def regret(self) -> Floats:
        """Of every save: 0 for the best, 1 for the worst or the untrained model."""
        lowest = self.held_out.min()
        return (self.held_out - lowest) / (max(self.held_out.max(), self.untrained, lowest + 1e-12) - lowest)

    def candidates(self) -> list[int]:
        """What the verdict names: half of the way, the second valley at a tenth of the run, the last."""
        half = half_of_path(self.moved)
        window = max(2, min(len(self.cosine) // 10, (len(self.cosine) - 3) // 3))
        found = valleys(cs_fluctuation(self.cosine, window))
        places = [half, found[1] if len(found) > 1 else None, len(self.cosine) - 1]
        return list(dict.fromkeys(int(place) for place in places if place is not None))


def curves_of(path: Path, work: Path) -> Curves:
    """Evaluate a run that was trained; kept beside it."""
    document = json.loads(path.with_suffix(".json").read_text("utf-8"))
    stored = path.with_suffix(".probe.npz")
    if not stored.exists():
        np.savez_compressed(stored, **_evaluate(path, work, document["setting"]))
    log = document["log"]
    held_out = np.array(log["held_out"])[STRIDE - 1 :: STRIDE]
    with np.load(stored) as found:
        return Curves(path.stem, found["losses"], held_out, log["untrained"][0], found["moved"], found["cosine"])


def _evaluate(path: Path, work: Path, described: dict[str, object]) -> dict[str, Floats]:
    import torch
    from families import FAMILIES
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import load_file
    from settings import Setting
    from train import _adapted, base_model

    setting = Setting(**described)  # type: ignore[arg-type]
    family = FAMILIES[setting.family]
    _, others = family.personal(setting.domain, setting.seed, setting.samples)
    torch.manual_seed(setting.seed)
    model = _adapted(base_model(family, setting.size, setting.domain, work), setting, family)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    tensors = load_file(path)
    repeats = 3 if setting.family == "diffusion" else 1  # each picture stands there three times, for three noises
    distinct = len(others[0]) // repeats
    found: dict[str, list[object]] = {"losses": [], "moved": [], "cosine": []}
    before: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for save in range(STRIDE - 1, len(tensors[next(iter(tensors))]), STRIDE):
            squares, cosines = 0.0, []
            for name, layer in layers.items():
                down, up, frozen = (tensors[f"{name}|{part}"] for part in "ABW")
                layer.lora_A["default"].weight.copy_(down[save])
                layer.lora_B["default"].weight.copy_(up[save])
                change = up[save].flatten(1).double() @ down[save].flatten(1).double()
                squares += float((change - before.get(name, 0.0)).square().sum())
                weight = frozen.flatten(1).double()
                cosines.append(float((change * weight).sum() / (change.norm() * weight.norm())))
                before[name] = change
            found["moved"].append(squares**0.5)
            found["cosine"].append(np.mean(cosines))
            rows = (
                [number + distinct * repeat for repeat in range(repeats)] for number in range(min(SAMPLES, distinct))
            )
            losses = [
                family.loss(
                    model, tuple(part[row] for part in others), torch.Generator().manual_seed(26 + row[0])
                ).item()
                for row in rows
            ]
            found["losses"].append(losses)
    return {name: np.array(values, dtype=np.float64) for name, values in found.items()}


def sample_run() -> Curves:
    """`sample_runs/text_peft` with the loss of each of its 80 held-out texts, as if its trainer had logged none."""
    import runpy

    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    folder = REPOSITORY / "sample_runs" / "text_peft"
    _, held_out = runpy.run_path(str(folder / "train.py"))["manual_chunks"]()
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    texts = torch.stack([item["input_ids"] for item in held_out])

    def losses(model: torch.nn.Module) -> Floats:
        with torch.no_grad():
            logits = model(input_ids=texts).logits[:, :-1].transpose(1, 2)
            rows = torch.nn.functional.cross_entropy(logits, texts[:, 1:], reduction="none").mean(dim=1)
        return rows.double().numpy()

    untrained = float(losses(base).mean())
    import polars as pl

    from lora_forensics import discover_runs, measure_run

    run = next(iter(discover_runs(folder / "output")))
    measured = measure_run(run, folder / "base")  # type: ignore[arg-type]
    moved = movement(measured.layers)["moved"].to_numpy()
    cosine = measured.layers.group_by("step").agg(pl.col("cosine").mean()).sort("step")["cosine"].to_numpy()
    rows = []
    for number, checkpoint in enumerate(run.checkpoints):  # type: ignore[union-attr]
        if number == 0:
            model = PeftModel.from_pretrained(base, checkpoint.path.parent)
        else:
            model.load_adapter(checkpoint.path.parent, f"a{number}")
            model.set_adapter(f"a{number}")
        rows.append(losses(model))
    found = np.array(rows)
    return Curves("text_peft", found, found.mean(axis=1), untrained, moved, cosine)


ABOUT = f"""\
Made by `python benchmarks/validity/probe.py`. The search of `lora-forensics probe` starts from half of the way, the
second valley, an early checkpoint and the last, and sees the loss of {SIZE} held-out samples at each checkpoint that it
asks for. Regret is counted on all held-out data of the run. 20 runs are one of each domain of the main set, 10 of the
confirmation and 10 of the replication domains; 40, 20 and 10 checkpoints each. The search was chosen on the first two
groups, before the replication runs were looked at; even grids, halving over steps, their logarithm or the path, and
models of the curve had medians within 0.01 of it. The samples set the limit, not the search: looking at every
checkpoint is hardly better.
"""


@dataclass(frozen=True, slots=True)
class Setup:
    """How a run is probed."""

    name: str
    evaluations: int | None = 6
    """None looks at every checkpoint."""
    size: int = SIZE
    keep: str = "lowest"
    """Of those that are as good within the noise: lowest, or earliest."""


def regrets_of(run: Curves, setup: Setup, random: np.random.Generator) -> Iterator[float]:
    """Regret of each draw."""
    regret, candidates = run.regret(), run.candidates()
    for _ in range(DRAWS):
        drawn = run.losses[:, random.choice(run.losses.shape[1], setup.size, replace=False)]
        seen = {place: float(row.mean()) for place, row in enumerate(drawn)}
        if setup.evaluations is not None:
            search = Search(len(drawn), candidates, setup.evaluations)
            for places in search:
                for place in places:
                    search.tell(place, seen[place])
            seen = search.losses
        best = min(seen, key=lambda place: (seen[place], place))
        if setup.keep == "earliest":
            best = min(place for place in seen if place == best or difference(drawn[place], drawn[best]).noise)
        yield float(regret[best])


SETUPS = (
    Setup("every checkpoint", None),
    Setup("six evaluations (the default)"),
    *(Setup(f"{number} evaluations", number) for number in (3, 4, 8, 12)),
    *(Setup(f"{size} sample{'s' * (size > 1)}, six evaluations", size=size) for size in (1, 2, 8, 16, 40)),
    Setup("six evaluations, the earliest within the noise", keep="earliest"),
)


def table(runs: Sequence[Curves], horizons: Sequence[float]) -> Iterator[str]:
    """A row for each setup."""
    yield "| | median | mean | 90 % |"
    yield "|---|---:|---:|---:|"
    for setup in SETUPS:
        random = np.random.default_rng(7)
        found = [r for run in runs for share in horizons for r in regrets_of(run.first(share), setup, random)]
        yield f"| {setup.name} | {np.median(found):.3f} | {np.mean(found):.3f} | {np.quantile(found, 0.9):.3f} |"


def main() -> None:
    """Parse the arguments, train, evaluate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for runs and base models; kept, and used again")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="probe-"))
    start = time.perf_counter()
    runs = trained(work, arguments.jobs)
    fresh = [run for run in runs if not run.name.startswith("main-")]
    groups: list[tuple[str, Sequence[Curves], Sequence[float]]] = [
        (f"{len(runs)} runs at three lengths, {DRAWS} draws each:", runs, HORIZONS),
        (f"The {len(fresh)} of fresh domains among them:", fresh, HORIZONS),
        (f"`sample_runs/text_peft`, a real PEFT run of 48 checkpoints, {DRAWS} draws of its 80 held-out texts:",
         [sample_run()], (1.0,)),
    ]  # fmt: skip
    parts = [TITLE, ABOUT]
    for title, chosen, horizons in groups:
        parts += [title, "", "\n".join(table(chosen, horizons)) + "\n"]
    found = "\n".join(parts)
    print(found)
    page, old = PAGE.read_text("utf-8"), section(PAGE)
    place = old or "## The runs of the earlier study\n"
    PAGE.write_text(page.replace(place, found + "\n" + ("" if old else place), 1), "utf-8")
    print(f"{time.perf_counter() - start:.0f} s, {work}")


def section(path: Path) -> str:
    """What stands in a page now; '' if nothing does."""
    page = path.read_text("utf-8") if path.exists() else ""
    _, title, rest = page.partition(TITLE)
    body, following, _ = rest.partition("\n## ")
    return title + body + ("\n" if following else "")


def trained(work: Path, jobs: int) -> list[Curves]:
    """Train and evaluate what is not there yet."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from functools import partial

    from replication import replication_settings
    from settings import confirmation_settings, main_settings

    settings = [*main_settings(True), *confirmation_settings(True), *replication_settings(True)]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(partial(_train, work), settings))


def _train(work: Path, setting: object) -> Curves:
    import torch
    from train import train

    torch.set_num_threads(1)
    train(setting, work)  # type: ignore[arg-type]
    return curves_of(work / "runs" / f"{setting.group}-{setting.name}.safetensors", work)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
