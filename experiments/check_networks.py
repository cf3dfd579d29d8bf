"""Networks of torchvision, timm and Hugging Face, each fitted, predicted, saved and loaded, and what that costs.

    pip install timm transformers peft
    python experiments/check_networks.py --config configs/check_networks.yaml

Random weights and random data; `real_networks.py` has the list. Each network meets each structure in a process of its own, on one thread:
CPU time in units of one training step of the same batch (forward, backward, a step of SGD), peak memory above what the network alone
takes, and the size of the file. The posterior from the file must predict what the one in memory does. What fails is a row with its error.
What was measured is kept in `name.jsonl`, line by line: started again, it goes on with what is missing, and `--report_only true` prints
the table of what is there. Where a package is not installed, its networks are left out, and the table says so.

`--coverage true` prints another table: which backends accept which of torchvision's classifiers, one of each family. It runs what a
fit runs first, uses and gradients of a few examples, held against autograd.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from bench_curvature.config import BenchError, check_names
from bench_curvature.run import cpu_model
from bench_curvature.tables import NOTHING, table
from network_cell import STRUCTURES, Record, in_own_process
from real_networks import CLASSIFIERS, REAL_NETWORKS, classifier
from study import KeptLines, read_config, write_result
from tqdm import tqdm

from laplace_ws import Laplace, UnsupportedParameterError
from laplace_ws.curvature import FACTOR_BACKENDS
from laplace_ws.experiment.environment import environment_record
from laplace_ws.experiment.lock import sole_writer

IN_STEPS = {
    "first batch": "first_batch_seconds",
    "a batch": "batch_seconds",
    "decomposition": "decomposition_seconds",
    "first prediction": "first_prediction_seconds",
    "a prediction": "prediction_seconds",
}
"""Columns in training steps, and the entries of a record that they show."""
IN_MIB = {"fit [MiB]": "fit_mib", "prediction [MiB]": "prediction_mib", "file [MiB]": "file_mib"}
"""Columns in MiB, likewise."""


@dataclass(frozen=True)
class NetworksConfig:
    """What is checked.

    Attributes:
        networks: by name; none given means all.
        structures: of kron and diag (all layers), last_layer (the Kronecker factors of the last layer).
        n_batches: batches of a fit; the first has the checks of the network.
        n_repeats: training steps, and later predictions, of which the median is given.
        processes: how many networks are measured at the same time.
        threads: of torch in each process.
        memory_gb: memory of each process; unlimited if not given.
        timeout_s: seconds after which a process is ended.
        retry_failed: whether to measure again what failed before.
        coverage: print which backends accept which of torchvision's classifiers instead.
        seed: of weights, data and samples.
        report_only: whether to print and write what is there, without further work.
        name: of the files of the results.
        out: their folder.
    """

    networks: list[str] = field(default_factory=list)
    structures: list[str] = field(default_factory=lambda: list(STRUCTURES))
    n_batches: int = 3
    n_repeats: int = 3
    processes: int = 1
    threads: int = 1
    memory_gb: float | None = None
    timeout_s: float = 3600.0
    retry_failed: bool = False
    coverage: bool = False
    seed: int = 0
    report_only: bool = False
    name: str = "check_networks"
    out: str = "runs"

    @property
    def measured(self) -> Path:
        """The file with one line for each measurement."""
        return Path(self.out) / f"{self.name}.jsonl"

    @property
    def chosen(self) -> list[str]:
        """Names of the networks."""
        return self.networks or list(CLASSIFIERS if self.coverage else REAL_NETWORKS)


def check_config(config: NetworksConfig) -> None:
    """Refuse what cannot be measured, before any work.

    Raises:
        BenchError: says which value is wrong, and what is possible.
    """
    check_names("network", config.networks, CLASSIFIERS if config.coverage else REAL_NETWORKS)
    check_names("structure", config.structures, STRUCTURES)
    for key in ("n_batches", "n_repeats", "processes", "threads"):
        if getattr(config, key) < 1:
            raise BenchError(f"{key}={getattr(config, key)} must be at least 1")
    for key, value in (("memory_gb", config.memory_gb), ("timeout_s", config.timeout_s)):
        if value is not None and not value > 0:
            raise BenchError(f"{key}={value} must be positive")
    if not config.structures:
        raise BenchError(f"structures is empty; name one at least, of {', '.join(STRUCTURES)}")


# ------------------------------------------------------------------ measurements


def items(config: NetworksConfig) -> Iterator[Record]:
    """Each network with each structure, the cheap structures first, and all that its figures depend on."""
    for structure in sorted(config.structures, key=["last_layer", "diag", "kron"].index):
        for name in config.chosen:
            yield {
                "network": name,
                "structure": structure,
                "title": REAL_NETWORKS[name].title,
                "n_examples": REAL_NETWORKS[name].n,
                "n_batches": config.n_batches,
                "n_repeats": config.n_repeats,
                "threads": config.threads,
                "seed": config.seed,
            }


def measure(config: NetworksConfig) -> None:
    """Measure what is missing, and keep each at once."""
    kept = KeptLines(config.measured)
    wanted = [
        item
        for item in items(config)
        if not REAL_NETWORKS[item["network"]].missing and not is_done(item, kept.known, config.retry_failed)
    ]
    options = {"threads": config.threads, "memory_gb": config.memory_gb, "timeout_s": config.timeout_s}
    with ThreadPoolExecutor(config.processes) as executor:
        futures = [executor.submit(in_own_process, item, **options) for item in wanted]
        try:
            for future in tqdm(as_completed(futures), total=len(futures), unit="cell", disable=None):
                answer = future.result()
                kept.add(answer)
                tqdm.write(f"{answer['network']}, {answer['structure']}: {answer.get('error', 'done')}")
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()
            raise


def is_done(item: Record, known: Sequence[Record], retry_failed: bool) -> bool:
    """Whether there is a record of an item, or, where failures are tried again, one without an error."""
    return any(item.items() <= record.items() and not (retry_failed and "error" in record) for record in known)


# ------------------------------------------------------------------ tables


def rows(config: NetworksConfig, measured: Sequence[Record]) -> list[Record]:
    """The last record of each item, network by network; for one whose package is missing, an error that says so."""
    found = []
    for item in items(config):
        records = [record for record in measured if item.items() <= record.items()]
        if records:
            found.append({"error": None, **records[-1]})
        elif missing := REAL_NETWORKS[item["network"]].missing:
            found.append({**item, "error": missing})
    place = {structure: i for i, structure in enumerate(config.structures)}
    return sorted(found, key=lambda row: (config.chosen.index(row["network"]), place[row["structure"]]))


def as_markdown(found: Sequence[Record]) -> str:
    """Two tables: the networks, and what each costs with each structure."""
    networks = {row["network"]: row for row in reversed(found) if "n_weights" in row}
    described = [
        [
            name,
            row["title"],
            str(row["n_examples"]),
            f"{row['n_weights']:,}",
            f"{row['training_seconds']:.2f}",
            f"{row['training_mib']:.0f}",
        ]
        for name, row in reversed(networks.items())
    ]
    header = ["", "network", "examples of a batch", "weights that train", "training step [s]", "its peak [MiB]"]
    costs = table(["", "structure", *IN_STEPS, *IN_MIB, ""], [_line(row) for row in found])
    return f"{table(header, described)}\n\n{costs}"


def _line(row: Record) -> list[str]:
    step = row.get("training_seconds")
    in_steps = [NOTHING if row.get(key) is None else _digits(row[key] / step) for key in IN_STEPS.values()]
    in_mib = [NOTHING if row.get(key) is None else _digits(row[key]) for key in IN_MIB.values()]
    return [row["network"], row["structure"], *in_steps, *in_mib, row["error"] or "same from the file"]


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def report(config: NetworksConfig) -> None:
    """Print the tables of what is there, and write them, and every figure of them."""
    found = rows(config, KeptLines(config.measured).known)
    print(as_markdown(found), flush=True)
    machine = environment_record(threads=config.threads, device="cpu", cpu=cpu_model(), libraries=_versions())
    path = write_result(config, config.name, {"machine": machine, "rows": found})
    path.with_suffix(".md").write_text(as_markdown(found) + "\n")


def _versions() -> dict[str, str]:
    packages = sorted({"torchvision", *(name for network in REAL_NETWORKS.values() for name in network.packages)})
    return {d.metadata["Name"]: d.version for name in packages for d in metadata.distributions(name=name)}


# ------------------------------------------------------------------ coverage


def print_coverage(names: Sequence[str]) -> None:
    """A line for each of torchvision's classifiers: "yes", or the error, of each backend."""
    print(table(["", *FACTOR_BACKENDS], []))
    for name in tqdm(names, unit="model", disable=None):
        tqdm.write(f"| {name} | {' | '.join(_accepted(name, backend) for backend in FACTOR_BACKENDS)} |")


def _accepted(name: str, backend: str) -> str:
    model, x = classifier(name)
    try:
        Laplace(model, "classification", backend=backend).check(x)
    except UnsupportedParameterError as error:
        return str(error)
    return "yes"


def main() -> None:
    config = read_config(NetworksConfig, __doc__)
    try:
        check_config(config)
    except BenchError as error:
        sys.exit(f"error: {error}")
    if config.coverage:
        print_coverage(config.chosen)
        return
    Path(config.out).mkdir(parents=True, exist_ok=True)
    if not config.report_only:
        with sole_writer(Path(config.out)):
            measure(config)
    report(config)


if __name__ == "__main__":
    main()
