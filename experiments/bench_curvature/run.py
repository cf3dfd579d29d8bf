"""A whole benchmark: which process measures what, in which order, and what came of it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench_curvature.config import BenchConfig, check_config
from bench_curvature.contestants import CONTESTANTS
from bench_curvature.measure import Item
from bench_curvature.rows import case_rows, curve_rows, update_rows
from laplace_ws.experiment.environment import environment_record

FORMAT_VERSION = 1
NO_GPU = "unmeasured (no GPU)"
_LONGEST_LINE = 120
_WORKER = [sys.executable, "-m", "bench_curvature.worker"]
_IMPORTS_FROM = Path(__file__).parents[1]
Json = dict[str, Any]


def run_bench(config: BenchConfig) -> Json:
    """Measure everything that `config` asks for; returns what the JSON file says.

    Raises:
        BenchError: the configuration does not allow it.
    """
    check_config(config)
    measured: list[Item] = []
    with (
        tempfile.TemporaryDirectory(prefix="laplace-ws-bench-") as folder,
        tqdm(total=_n_items(config), unit="measurement", disable=None) as bar,
    ):
        for items in _processes(config, measured):
            bar.set_description(_title(items[0]))
            for answer in answers(config, items, Path(folder)):
                measured.append(answer)
                bar.update()
    return {
        "name": config.name,
        "format_version": FORMAT_VERSION,
        "config": asdict(config),
        "machine": machine(config),
        "contestants": {name: CONTESTANTS[name].computes for name in config.contestants},
        "cases": case_rows(config, measured),
        "curves": curve_rows(measured),
        "updates": update_rows(measured),
        "measurements": measured,
    }


def _processes(config: BenchConfig, measured: Sequence[Item]) -> Iterator[list[Item]]:
    """The items of each process in turn; what has failed is not tried again in the next round."""
    for number in range(config.n_rounds):
        for contestant in config.contestants:
            if items := _not_failed(_case_items(config, "times", contestant), measured):
                yield [{**item, "round": number} for item in items]
    for contestant in config.contestants if config.memory else []:
        failed = [{**item, "kind": "memory"} for item in measured if item["kind"] == "times"]
        if items := _not_failed(_case_items(config, "memory", contestant), failed):
            yield items
    for number in range(config.n_rounds):
        for make_items in (_curve_items, _update_items):
            if items := _not_failed(make_items(config), measured):
                yield [{**item, "round": number} for item in items]


def _case_items(config: BenchConfig, kind: str, contestant: str) -> list[Item]:
    return [{"kind": kind, "contestant": contestant, **case._asdict()} for case in config.cases()]


def _curve_items(config: BenchConfig) -> list[Item]:
    axes = {"batch_size": config.curves.batch_sizes, "n_classes": config.curves.n_classes}
    return [
        {"kind": "curve", "axis": axis, "kfac_approx": approx}
        for axis, values in axes.items()
        if values
        for approx in config.kfac_approxes
    ]


def _update_items(config: BenchConfig) -> list[Item]:
    return [
        {"kind": "update", "precision": precision, "batch_size": n, "kfac_approx": approx}
        for precision in config.updates.precisions
        for n in config.updates.batch_sizes
        for approx in config.kfac_approxes
    ]


def _not_failed(items: list[Item], measured: Sequence[Item]) -> list[Item]:
    failed = [answer for answer in measured if "error" in answer]
    return [item for item in items if not any(item.items() <= answer.items() for answer in failed)]


def _n_items(config: BenchConfig) -> int:
    cases = len(config.cases()) * len(config.contestants)
    others = len(_curve_items(config)) + len(_update_items(config))
    return (cases + others) * config.n_rounds + cases * config.memory


def _title(item: Item) -> str:
    return item.get("contestant", item["kind"])


def answers(config: BenchConfig, items: list[Item], folder: Path) -> Iterator[Item]:
    """What a process of its own measured, one answer an item; an error for each item where the process ended early."""
    device = config.updates.device if items[0]["kind"] == "update" else config.device
    if device == "cuda" and not torch.cuda.is_available():
        yield from ({**item, "error": NO_GPU} for item in items)
        return
    log = folder / "stderr.txt"
    n_answers = 0
    with log.open("w", encoding="utf-8") as stderr, _worker(config, folder, stderr) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"config": asdict(config), "items": items, "parent": os.getpid()}))
        process.stdin.close()
        for line in process.stdout:
            n_answers += 1
            yield json.loads(line)
    last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""])[-1]
    for item in items[n_answers:]:
        yield {**item, "error": f"its process ended with status {process.returncode}: {last[:_LONGEST_LINE]}"}


@contextmanager
def _worker(config: BenchConfig, folder: Path, stderr: Any) -> Iterator[subprocess.Popen[str]]:
    """A worker process that never outlives the context."""
    threads = str(config.threads)
    paths = [str(_IMPORTS_FROM), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TMPDIR": str(folder),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    process = subprocess.Popen(
        _WORKER,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        encoding="utf-8",
        env=os.environ | environment,
    )
    try:
        yield process
        process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def machine(config: BenchConfig) -> Json:
    """Processor, GPU, threads, versions, and whether torch lets float32 products on a GPU be TF32."""
    distributions = {CONTESTANTS[name].distribution for name in config.contestants} - {""}
    has_gpu = torch.cuda.is_available()
    return environment_record(
        threads=config.threads,
        device=config.device,
        cpu=cpu_model(),
        gpu=torch.cuda.get_device_name() if has_gpu else None,
        tf32={"matmul": torch.get_float32_matmul_precision() != "highest", "cudnn": torch.backends.cudnn.allow_tf32},
        libraries={name: _version(name) for name in sorted(distributions)},
    )


def cpu_model() -> str:
    """Name of the processor as Linux gives it, or what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
