"""What the analyses cost: processor time beside the main pass, at rank 16 on layers of 1280 x 1280.

    python benchmarks/analyses.py [--checkpoints 50] [--rank 16] [--width 1280] [--repeat 7]

The main pass is the row moments and the metrics of the first version; the second line adds every column that is filled
by default, the others what is asked for by name, for each checkpoint.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch

from lora_forensics.analyses import ANALYSES
from lora_forensics.analyses.frozen import Frozen, analyse
from lora_forensics.metrics import METRICS
from lora_forensics.moments import LowRankChange, Weight, full_precision

FIRST = 16
"""Metrics of the first version: they stand first in the table."""


def seconds(work: Callable[[], object], repeat: int) -> float:
    """Processor seconds, best of several."""
    found = []
    for _ in range(repeat):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("checkpoints", 50), ("rank", 16), ("width", 1280), ("repeat", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    count, rank, width = given.checkpoints, given.rank, given.width
    generator = torch.Generator().manual_seed(0)
    # a spectrum that decays, as those of trained weights do
    decay = torch.arange(1, width + 1).pow(-0.5)
    weight = (torch.randn(width, width, generator=generator) * decay) @ torch.randn(width, width, generator=generator)
    weight /= width**0.5
    down = torch.randn(1, rank, width, generator=generator) / width**0.5
    down = down + 0.01 * torch.randn(count, rank, width, generator=generator).cumsum(dim=0) / width**0.5
    up = 0.01 * torch.randn(count, width, rank, generator=generator).cumsum(dim=0)
    read = Weight(width, width, lambda start, stop: weight[start:stop])
    scale = torch.ones(count, dtype=torch.float64)
    cpu = torch.device("cpu")

    def main_pass(metrics: int) -> None:
        moments = LowRankChange(down, up, scale, 1).moments(read, cpu)
        for metric in METRICS[:metrics]:
            if metric.needs <= moments.known:
                metric.compute(moments).tolist()

    def bare() -> None:
        with mock.patch("lora_forensics.moments.low_rank.moves", return_value={}):
            main_pass(FIRST)

    with full_precision():
        pairs = [(seconds(bare, 1), seconds(lambda: main_pass(len(METRICS)), 1)) for _ in range(2 * given.repeat)]
        before, after = (min(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(second / first for first, second in pairs)
        print(f"{count} checkpoints, rank {rank}, {width} x {width}, {torch.get_num_threads()} threads")
        print(f"main pass                     {before / count * 1e3:9.2f} ms a checkpoint")
        print(
            f"with all default columns      {after / count * 1e3:9.2f} ms a checkpoint   x {after / before:.3f} (best)"
        )
        print(f"                                                     x {ratio:.3f} (median of pairs)")
        change = LowRankChange(down, up, scale)
        frozen = Frozen(weight.double())
        once = seconds(lambda: frozen.decomposition, 1)
        print(f"decomposition of the weight   {once * 1e3:9.0f} ms once a base")
        for name in ANALYSES:
            cost = seconds(lambda name=name: analyse([name], frozen, change, [count - 1], rank), 2)
            print(f"--analysis {name:<18} {cost * 1e3:9.0f} ms a checkpoint")


if __name__ == "__main__":
    main()
