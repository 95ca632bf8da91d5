"""Every engine gives what the serial one gives, loses no work but that of a worker that dies, and leaves no process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_work
import pytest
from cli_runs import project
from click.testing import CliRunner, Result
from factories import library
from wholes import REPOSITORY, contents

from lora_forensics import measure
from lora_forensics.cli import main
from lora_forensics.discovery import discover_runs
from lora_forensics.engines import ENGINES, Engine, EngineSettings
from lora_forensics.engines.processes import Processes
from lora_forensics.errors import LoraForensicsError, UsageError, WorkerError
from lora_forensics.measure import MeasureOptions, Progress, measure_run
from lora_forensics.pipeline import _Measure
from lora_forensics.records import Run

PARALLEL = [name for name in ENGINES if name != "serial"]


def call(*arguments: str | Path) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def start(name: str, **settings: Any) -> Engine:
    """An engine of two workers."""
    if name == "ray":
        library("ray")
    return ENGINES[name](EngineSettings(**{"workers": 2, **settings}))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs of eight checkpoints. Read only."""
    return project(tmp_path_factory.mktemp("tiny") / "runs", ["a", "b", "c"], count=8)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A real Ray cluster of two workers, of this process; its address."""
    ray = library("ray")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    paths = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])}}
    quiet = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
    ray.init(address="local", num_cpus=2, runtime_env=paths, **quiet)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.mark.parametrize("name", ENGINES)
def test_every_item_comes_back_with_its_result_or_its_own_error(name: str, cluster: str) -> None:
    """An error of one item is told beside it; the others have results, and progress is that of all."""
    told: list[float] = []
    with start(name, advance=told.append) as engine:
        found = dict(engine.map(engine_work.square, iter(range(6))))
    assert {item: result[0] for item, result in found.items() if isinstance(result, tuple)} == {
        n: n * n for n in range(6) if n != 3
    }
    assert isinstance(found[3], LoraForensicsError)
    assert (found[3].message, found[3].hint) == ("no 3", "take another")
    assert sum(told) == 6


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_takes_no_item_before_a_worker_is_free(name: str, cluster: str) -> None:
    """A thousand runs are not planned at once."""
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(4, 20):
            taken.append(number)
            yield number

    with start(name) as engine:
        for done, _ in enumerate(engine.map(engine_work.square, items()), start=1):
            assert len(taken) <= done + engine.workers


@pytest.mark.parametrize("name", PARALLEL)
def test_two_workers_work_at_once(name: str, cluster: str, tmp_path: Path) -> None:
    """Two items meet."""
    with start(name) as engine:
        found = [result for _, result in engine.map(engine_work.meet, [str(tmp_path)] * 2)]
    assert len(set(found)) == 2
    assert 0 not in found


@pytest.mark.parametrize("name", ENGINES)
def test_a_bug_is_a_bug_wherever_it_happens(name: str, cluster: str) -> None:
    """It is raised here, and names what went wrong there."""
    with start(name) as engine, pytest.raises((ZeroDivisionError, RuntimeError), match="division"):
        list(engine.map(engine_work.fail, [1, 0]))


def test_processes_share_the_cores() -> None:
    """Each worker's torch has its part of them."""
    cores = os.cpu_count() or 1
    with start("processes", workers=cores) as engine:
        ((_, found),) = engine.map(engine_work.threads, [1])
    assert found == int(os.environ.get("OMP_NUM_THREADS", "1"))


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_a_process_that_dies_takes_one_item_with_it() -> None:
    """The error says how it died; the others finish on other workers."""
    with start("processes") as engine:
        found = dict(engine.map(engine_work.die, [(number, "") for number in range(6)]))
    assert [found[number, ""] for number in (0, 2, 3, 4, 5)] == [0, 2, 3, 4, 5]
    error = found[1, ""]
    assert isinstance(error, WorkerError)
    assert "signal 9" in error.message


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_ray_runs_the_task_of_a_lost_worker_again(cluster: str, tmp_path: Path) -> None:
    """One that kills its worker once has a result; one that always does has an error, and the others finish."""
    with start("ray") as engine:
        once = dict(engine.map(engine_work.die, [(number, str(tmp_path / "died")) for number in range(4)]))
        always = dict(engine.map(engine_work.die, [(number, "") for number in range(3)]))
    assert (tmp_path / "died").exists()
    assert list(once.values()).count(1) == 1
    assert sorted(map(str, once.values())) == ["0", "1", "2", "3"]
    assert (always[0, ""], always[2, ""]) == (0, 2)
    assert isinstance(always[1, ""], WorkerError)


def test_all_engines_write_the_same_bytes(tiny: Path, tmp_path: Path, cluster: str) -> None:
    """Tables, verdicts, plots and reports, with several units of work in each run; Ray by its address."""
    size = next(found for found in discover_runs(tiny) if isinstance(found, Run)).checkpoints[0].size
    written = {}
    for name in ENGINES:
        address = ("--ray-address", cluster) if name == "ray" else ()
        work = ("--engine", name, "--workers", "2", "--memory", str(4 * size), *address)
        result = call("scan", tiny, "--out", tmp_path / name, *work)
        assert result.exit_code == 0, result.output
        assert "measured 24 checkpoints" in result.output
        written[name] = contents(tmp_path / name)
    assert len(written["serial"]) > 24
    for name in PARALLEL:
        assert written[name] == written["serial"], name


def test_a_run_of_its_own_on_two_processes(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`measure_run` takes an engine too, and its progress is complete."""

    class Counting(Progress):
        """Sums up."""

        total = done = 0.0

        def begin(self, _: str, checkpoints: int) -> None:
            self.total += checkpoints

        def advance(self, checkpoints: float) -> None:
            self.done += checkpoints

    run = next(found for found in discover_runs(tiny) if isinstance(found, Run))
    progress = Counting()
    monkeypatch.setattr(measure, "_TOGETHER", 3)
    measured = measure_run(run, options=MeasureOptions(engine="processes", workers=2, progress=progress))
    assert measured.layers.equals(measure_run(run).layers)
    assert progress.done == pytest.approx(progress.total) == 8


class Deadly(Processes):
    """Kills the worker that gets run b, as a machine without memory would."""

    def _give(self, function: Any, item: Any) -> None:
        super()._give(function, item)
        if isinstance(item, _Measure) and item.unit.run == "b":
            worker, _ = next(entry for entry in self._busy.values() if entry[1] is item)
            worker.process.kill()


def test_a_dead_worker_costs_its_run_and_no_other(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 3 and the reason; the next scan measures that run alone, and all is as if nothing had happened."""
    monkeypatch.setitem(ENGINES, "deadly", Deadly)
    arguments = ("scan", tiny, "--out", tmp_path / "out", "--no-plots")
    broken = call(*arguments, "--engine", "deadly", "--workers", "2")
    assert broken.exit_code == 3, broken.output
    assert re.search(r"1 of 3 runs could not be measured: b: the worker .* died \(ended by signal 9\)", broken.stderr)
    again = call(*arguments)
    assert "measured 8 new checkpoints; 16 known before" in again.output
    assert call("scan", tiny, "--out", tmp_path / "calm", "--no-plots").exit_code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "calm")


def test_a_rescan_without_news_starts_no_worker(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stored verdicts are told."""
    arguments = ("scan", tiny, "--out", tmp_path / "out", "--no-plots")
    first = call(*arguments)
    before = contents(tmp_path / "out")
    monkeypatch.setattr(Processes, "_give", None)
    second = call(*arguments, "--engine", "processes")
    assert second.exit_code == 0, second.output
    assert second.output.replace("nothing new: 24 known before", "measured 24 checkpoints") == first.output
    assert contents(tmp_path / "out") == before


def test_figures_that_were_not_drawn_are_drawn_later(tiny: Path, tmp_path: Path) -> None:
    """By `report`, or by a scan with nothing new to measure."""
    arguments = ("scan", tiny / "a", "--base", tiny / "base.safetensors", "--out", tmp_path / "out")
    assert call(*arguments, "--no-plots").exit_code == 0
    assert not list((tmp_path / "out").rglob("*.png"))
    assert call(*arguments).exit_code == 0
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3


def test_no_cluster_at_an_address_is_bad_usage(tiny: Path, tmp_path: Path) -> None:
    """In a process of its own: one process is in one cluster."""
    library("ray")
    arguments = ["scan", tiny, "--out", tmp_path / "out", "--engine", "ray", "--ray-address", "here:there"]
    found = shell(*arguments)
    assert found.returncode == 2, found.stderr
    assert "no Ray cluster at here:there" in found.stderr


def test_ray_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is measured."""
    monkeypatch.setattr("lora_forensics.engines.ray.find_spec", lambda _: None)
    with pytest.raises(UsageError, match="ray") as caught:
        ENGINES["ray"](EngineSettings())
    assert "lora-forensics[ray]" in caught.value.hint


def test_a_local_ray_is_stopped_again(tiny: Path, tmp_path: Path) -> None:
    """It starts with the scan and is gone after it, from a folder that the paths are relative to."""
    library("ray")
    found = shell("scan", "a", "--base", "base.safetensors", "--out", tmp_path / "out", "--engine", "ray", cwd=tiny)
    assert found.returncode == 0, found.stderr
    assert "measured 8 checkpoints" in found.stdout
    assert "Traceback" not in found.stderr


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_scan(how: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C and kill -9 of the scan alone leave no worker behind."""
    runs = project(tmp_path / "runs", [f"r{number}" for number in range(30)], count=4)
    command = ["scan", runs, "--out", tmp_path / "out", "--engine", "processes", "--workers", "2"]
    scan = subprocess.Popen(
        [sys.executable, "-m", "lora_forensics", *map(str, command)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while scan.poll() is None and not list((tmp_path / "out").rglob("layers.parquet")):
        time.sleep(0.05)
    workers = children(scan.pid)
    assert len(workers) >= 2
    scan.send_signal(how)
    _, said = scan.communicate(timeout=60)
    if how is signal.SIGINT:
        assert scan.returncode == 130
        assert "run the same command to go on" in said
    ended = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < ended:
        time.sleep(0.1)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def environment() -> dict[str, str]:
    """Of a command in a process of its own."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "NO_COLOR": "1"}


def shell(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "lora_forensics", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment(), encoding="utf-8")


def children(pid: int) -> list[int]:
    """The processes that a process started."""
    return [int(pid) for task in Path(f"/proc/{pid}/task").iterdir() for pid in (task / "children").read_text().split()]
