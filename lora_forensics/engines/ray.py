"""Units of work as tasks of a Ray cluster: an existing one, or one on this machine that is started and stopped here."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any, Self

from lora_forensics.engines.interface import EngineSettings, Item, Outcome, Result, Work, outcome, unpack
from lora_forensics.errors import LoraForensicsError, UsageError, WorkerError

_RETRIES = 3
"""Times that a task is run again whose worker or node was lost."""


class Ray:
    """Tasks of one core each, and of one GPU each where the cluster has some; files must be where they are here."""

    def __init__(self, settings: EngineSettings) -> None:
        if find_spec("ray") is None:
            raise UsageError("--engine ray needs the library ray", "pip install 'lora-forensics[ray]'")
        self._settings = settings
        self._started = False
        self._task: Any = None
        self._cores = self._gpus = 0

    @property
    def workers(self) -> int:
        """How many were asked for; else one for each GPU, or each core where no GPU is wanted or there."""
        if self._settings.workers:
            return self._settings.workers
        if self._address() == "local":
            return os.cpu_count() or 1
        self._connect()
        return max(1, self._gpus or self._cores)

    def _address(self) -> str:
        return self._settings.address or os.environ.get("RAY_ADDRESS") or "local"

    def map(
        self, function: Work[Item, Result], items: Iterable[Item]
    ) -> Iterator[tuple[Item, Result | LoraForensicsError]]:
        """Yield results as they come."""
        waiting = iter(items)
        pending: dict[Any, Any] = {}
        more = True
        while more or pending:
            while more and len(pending) < self.workers:
                try:
                    item = next(waiting)
                except StopIteration:
                    more = False
                    break
                pending[self._submit(function, item)] = item
            if pending:
                import ray

                ready, _ = ray.wait(list(pending), num_returns=1)
                for reference in ready:
                    yield pending.pop(reference), self._collect(reference)

    def _submit(self, function: Work[Any, Any], item: object) -> Any:
        self._connect()
        return self._task.remote(function, item, os.getcwd())

    def _collect(self, reference: Any) -> Any:
        import ray

        try:
            found, done = ray.get(reference)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            if isinstance(error, ray.exceptions.RayTaskError):  # before our own code: it is not there
                hint = "install lora-forensics in the same version on every node"
                return WorkerError(f"a worker of the Ray cluster cannot do the work: {reason}", hint)
            hint = "scan again to go on; if memory ran out, take fewer --workers or less --memory"
            return WorkerError(f"Ray lost the work on it, {_RETRIES} retries included: {reason}", hint)
        self._settings.advance(done)
        return unpack(found)

    def _connect(self) -> None:
        """Join or start a cluster, once.

        Raises:
            UsageError: there is no cluster at this address.
        """
        if self._task is not None:
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray warns of its own old default
        import ray

        logging.getLogger("ray").setLevel(logging.WARNING)
        if not ray.is_initialized():
            address = self._address()
            own: dict[str, Any] = {}
            if address == "local":
                paths = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
                own = {"num_cpus": self.workers, "include_dashboard": False, "runtime_env": paths}
            try:
                ray.init(address=address, log_to_driver=False, configure_logging=False, **own)
            except (ConnectionError, RuntimeError, ValueError) as error:
                reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
                hint = "check --ray-address, or leave it out"
                raise UsageError(f"no Ray cluster at {address}: {reason}", hint) from error
            self._started = True
        there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        self._cores = int(there.get("CPU", 1))
        if self._settings.device.startswith(("auto", "cuda")):
            self._gpus = int(there.get("GPU", 0))
        options = {"num_cpus": 1, "num_gpus": min(1, self._gpus), "max_retries": _RETRIES}
        self._task = ray.remote(_run).options(**options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        """Leave the cluster, and stop it if it was started here."""
        self._task = None
        if self._started:
            import ray

            ray.shutdown()
            self._started = False


def _run(function: Work[Any, Any], item: object, folder: str) -> tuple[Outcome, float]:
    """One task, and how far it got by `advance`."""
    done: list[float] = []
    try:
        os.chdir(folder)  # paths may be relative
    except OSError as error:
        if getattr(item, "anywhere", False):
            return outcome(function, item, done.append), sum(done)
        message = f"{folder} cannot be entered on a node of the Ray cluster: {error.strerror}"
        return ("error", WorkerError(message, "all nodes must see the same files, under the same paths")), 0.0
    return outcome(function, item, done.append), sum(done)
