"""A second set of runs, drawn after the confirmation set had been scored, to narrow its intervals.

Its 50 runs share domains with the confirmation set, and nothing else: small models, other settings, samples and seeds.
Every rule keeps the constant that it had. What is asked of it stands in PREREGISTERED.txt, written before the training.
"""

from __future__ import annotations

import numpy as np
from settings import CONFIRMATION_DOMAINS, OPTIMIZERS, Setting, _draw

RUNS = 5
"""Runs of each domain."""


def replication_settings(small: bool) -> list[Setting]:
    """Five runs for each of the ten domains, or one."""
    random = np.random.default_rng(30)
    return [
        _draw(random, "replication", family, domain, "small", (*OPTIMIZERS, "adagrad"), number)
        for family, domains in CONFIRMATION_DOMAINS.items()
        for domain in domains
        for number in range(1 if small else RUNS)
    ]
