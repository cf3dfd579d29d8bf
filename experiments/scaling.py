"""What a fit costs on several processes, by its parts, and what that means for more of them than there are here.

    python experiments/scaling.py --config configs/scaling.yaml

Fits of a Wide ResNet to random images, divided among processes of torch's gloo group on this machine: seconds of each process for its
share of the data, for the sum of the factors and for its share of the eigenvalues, and the bytes that are sent. Then the same for any
number of processes, from the parts measured on one: the images are divided evenly, the blocks as `matrices.division` divides them by
their cost, each block at its measured time, and what is sent takes the given bandwidth. A profile of a fit on one process says what the
machinery for several costs there. Last, operations and bytes of well-known networks, counted from the shapes of their weights.
"""

from __future__ import annotations

import cProfile
import multiprocessing
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from bench_curvature.setting import make_batch, make_network
from bench_curvature.tables import table
from study import read_config, write_result

from laplace_ws import Laplace
from laplace_ws.curvature import Curvature
from laplace_ws.curvature.backends import make_backend
from laplace_ws.curvature.checks import LinearisationCheck
from laplace_ws.curvature.curvature_sum import CurvatureSum
from laplace_ws.data import TensorLoader
from laplace_ws.distributed import processes
from laplace_ws.kfac.approximation import KfacApprox
from laplace_ws.kfac.kron_accumulator import KronAccumulator
from laplace_ws.likelihoods import Categorical
from laplace_ws.matrices import Kron
from laplace_ws.matrices.division import cost, decompose, divided
from laplace_ws.models import WideResNet

Row = dict[str, Any]
MACHINERY = ("distributed.py", "curvature/processes.py", "matrices/division.py")
"""The files that one process alone would not need."""


@dataclass(frozen=True)
class ScalingConfig:
    """What is measured.

    Attributes:
        depth: layers of the Wide ResNet, 6n + 4.
        width: width factor.
        n_images: images of a fit, all processes together.
        batch_size: images of a batch of one process.
        kfac_approxes: of reduce, expand.
        n_processes: numbers of processes that are measured, beside one.
        n_projected: numbers of processes for which the time is computed.
        n_images_projected: images of the fits that are computed.
        bandwidth: gigabytes per second that each process sends and receives there.
        n_repeats: fits; the median is given, and the first of them alone checks the network.
        seed: of weights and images.
        name: of the file of the results.
        out: its folder.
    """

    depth: int = 16
    width: int = 4
    n_images: int = 256
    batch_size: int = 64
    kfac_approxes: list[str] = field(default_factory=lambda: ["reduce", "expand"])
    n_processes: list[int] = field(default_factory=lambda: [2, 4])
    n_projected: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 64, 1000])
    n_images_projected: int = 50_000
    bandwidth: float = 10.0
    n_repeats: int = 3
    seed: int = 0
    name: str = "scaling"
    out: str = "runs"


def check_config(config: ScalingConfig) -> None:
    """Refuse what cannot be measured.

    Raises:
        ValueError: names the option.
    """
    for name in ("n_processes", "n_projected"):
        if not getattr(config, name) or min(getattr(config, name)) < 1:
            raise ValueError(f"{name} must be numbers of at least 1: {getattr(config, name)}")
    for name in ("batch_size", "n_repeats", "bandwidth"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name}={getattr(config, name)} must be positive")
    if config.n_images < max(config.n_processes):
        raise ValueError(
            f"n_images={config.n_images} leaves one of {max(config.n_processes)} processes without an image"
        )
    unknown = set(config.kfac_approxes) - {"reduce", "expand"}
    if unknown or not config.kfac_approxes:
        raise ValueError(f"kfac_approxes={config.kfac_approxes} must be of reduce and expand")


# ------------------------------------------------------------------ one process of several


def share_of(config: ScalingConfig) -> tuple[torch.nn.Module, TensorLoader]:
    """The network, and the images of this process."""
    group = processes()
    model = make_network(config.depth, config.width, 10, "fixup", 32, config.seed)
    x, y = make_batch(config.n_images, 10, 32, config.seed)
    return model, TensorLoader(
        x, y, batch_size=config.batch_size * group.size, num_replicas=group.size, rank=group.rank
    )


def measure_parts(config: ScalingConfig, kfac_approx: str) -> Row:
    """Seconds of the parts of a fit in this process, medians over the repetitions, and bytes sent for the sum and for the eigenvalues."""
    group = processes()
    model, loader = share_of(config)
    found: dict[str, list[float]] = {}

    def note(name: str, start: tuple[float, float]) -> tuple[float, float]:
        now = time.perf_counter(), time.process_time()
        found.setdefault(name, []).append(now[0] - start[0])
        found.setdefault(f"{name}, CPU", []).append(now[1] - start[1])
        group.gather(None)  # so that no part waits for another one's
        return time.perf_counter(), time.process_time()

    n_bytes: list[int] = [0, 0]
    backend = make_backend("native")
    check = LinearisationCheck(backend, model)  # kept between passes, as in online tuning
    for _ in range(config.n_repeats):
        approximations = dict.fromkeys((name for name, _ in model.named_parameters()), KfacApprox(kfac_approx))
        sums = CurvatureSum(
            model,
            Categorical(),
            lambda parameters, a=approximations: KronAccumulator(parameters, a),
            curvature=Curvature.EF,
            backend=backend,
            check=check,
        )
        sent = getattr(group, "n_bytes", 0)
        group.gather(None)
        now = time.perf_counter(), time.process_time()
        for x, y in loader:
            sums.add(x, y)
        now = note("pass", now)
        sums.accumulator.sum_over(group)
        now = note("sum", now)
        n_bytes[0] = getattr(group, "n_bytes", 0) - sent
        H = sums.result()
        assert isinstance(H, Kron)
        now = time.perf_counter(), time.process_time()
        decompose(H, group, vectors=False)
        for block in H.values():
            block.factor_eigenvalues  # noqa: B018 - computed here by one process alone
        note("eigenvalues", now)
        n_bytes[1] = getattr(group, "n_bytes", 0) - sent - n_bytes[0]
    return {**{name: statistics.median(values) for name, values in found.items()}, "n_bytes": n_bytes}


def measure_fit(config: ScalingConfig, kfac_approx: str) -> Row:
    """Seconds of a whole fit with its evidence in this process, and that evidence."""
    group = processes()
    model, loader = share_of(config)
    la = Laplace(model, "classification", kfac_approx=kfac_approx, curvature="ef")
    seconds, evidence = [], 0.0
    for _ in range(config.n_repeats):
        group.gather(None)
        start = time.perf_counter()
        la.fit(loader, recheck=False)
        evidence = float(la.log_marginal_likelihood())
        seconds.append(time.perf_counter() - start)
    return {"fit": statistics.median(seconds), "evidence": evidence}


def measure_blocks(config: ScalingConfig, kfac_approx: str) -> Row:
    """Cost and seconds of the eigenvalues of each block, in one process."""
    model, loader = share_of(config)
    la = Laplace(model, "classification", kfac_approx=kfac_approx, curvature="ef")
    la.fit(loader)
    assert isinstance(la.H, Kron)
    seconds, costs = [], []
    for block in la.H.values():
        of_block = []
        for _ in range(config.n_repeats):
            again = replace(block)  # without what it knows of itself
            start = time.process_time()
            again.factor_eigenvalues  # noqa: B018 - this computes them
            of_block.append(time.process_time() - start)
        seconds.append(statistics.median(of_block))
        costs.append(cost(block))
    return {"seconds": seconds, "costs": costs}


def measure_machinery(config: ScalingConfig, kfac_approx: str) -> float:
    """The part of a fit on one process that is spent in what several need; an upper bound, as a profile counts nested calls twice."""
    model, loader = share_of(config)
    la = Laplace(model, "classification", kfac_approx=kfac_approx, curvature="ef")
    la.fit(loader)
    profile = cProfile.Profile()
    profile.runcall(lambda: (la.fit(loader, recheck=False), float(la.log_marginal_likelihood())))
    times = pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
    spent = sum(entry[3] for (file, _, _), entry in times if Path(file).as_posix().endswith(MACHINERY))
    return spent / max(entry[3] for _, entry in times)


MEASURES = {f.__name__: f for f in (measure_parts, measure_fit, measure_blocks, measure_machinery)}


def on_processes(n: int, config: ScalingConfig, kfac_approx: str) -> list[dict[str, Any]]:
    """What the measurements return on each of n processes, which are started for them; the blocks and the machinery are those of one."""
    names = list(MEASURES) if n == 1 else ["measure_parts", "measure_fit"]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="laplace-ws-scaling-") as folder, ProcessPoolExecutor(n, context) as pool:
        tasks = [pool.submit(_on_process, rank, n, folder, names, config, kfac_approx) for rank in range(n)]
        return [task.result() for task in tasks]


def _on_process(
    rank: int, n: int, folder: str, names: Sequence[str], config: ScalingConfig, kfac_approx: str
) -> dict[str, Any]:
    torch.set_num_threads(1)
    if n > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n)
    try:
        return {name: MEASURES[name](config, kfac_approx) for name in names}
    finally:
        if n > 1:
            dist.destroy_process_group()


# ------------------------------------------------------------------ counts by shapes

NETWORKS: dict[str, Callable[[], torch.nn.Module]] = {
    "WRN-16-4": lambda: WideResNet(16, 4, 3, 10),
    "WRN-28-10": lambda: WideResNet(28, 10, 3, 10),
    "ResNet-18": torchvision.models.resnet18,
    "ViT-B/16": torchvision.models.vit_b_16,
    "ViT-L/16": torchvision.models.vit_l_16,
    "decoder layer, 4096/14336": lambda: torch.nn.Sequential(
        *(torch.nn.Linear(i, o) for i, o in [(4096, 4096)] * 4 + [(4096, 14336)] * 2 + [(14336, 4096)])
    ),
}


def sides_of(name: str, shape: torch.Size) -> list[tuple[int, int]]:
    """Sides of the factors of a weight: those of the queries, keys and values apart; none of a vector, or of one that is added."""
    n_out, n_in = shape[0], shape[1:].numel()
    if len(shape) < 2 or n_out == 1:
        return []
    return [(n_out // 3, n_in)] * 3 if name.endswith("in_proj_weight") else [(n_out, n_in)]


def counted_rows(config: ScalingConfig) -> list[Row]:
    """Of each network: its weights, bytes of its factors in float32, operations of their eigenvalues, and how far these divide."""
    rows = []
    for name, make in NETWORKS.items():
        with torch.device("meta"):
            sides = [side for name, p in make().named_parameters() for side in sides_of(name, p.shape)]
        operations = [4 / 3 * (n_out**3 + n_in**3) for n_out, n_in in sides]
        n_triangle = sum(side * (side + 1) // 2 for pair in sides for side in pair)
        loads = {}
        for n in config.n_projected:
            loads[n] = [0.0] * n
            for owner, cost_of_block in zip(divided(operations, n), operations, strict=True):
                loads[n][owner] += cost_of_block
        rows.append(
            {"network": name, "n_weights": sum(o * i for o, i in sides), "largest_side": max(map(max, sides))}
            | {"sum_bytes": 4 * n_triangle, "operations": sum(operations)}
            | {"speed_up": {n: sum(operations) / max(load) for n, load in loads.items()}}
        )
    return rows


# ------------------------------------------------------------------ all of them


def measured_row(kfac_approx: str, of_each: Sequence[dict[str, Any]]) -> Row:
    """The row of an approximation and a number of processes; of each part, the seconds of the slowest process."""
    parts, fits = ([found[name] for found in of_each] for name in ("measure_parts", "measure_fit"))
    slowest = {name: max(part[name] for part in parts) for name in parts[0] if name != "n_bytes"}
    row = {"kfac_approx": kfac_approx, "n_processes": len(of_each), **slowest}
    row |= dict(zip(("sum_bytes", "eigenvalue_bytes"), parts[0]["n_bytes"], strict=True))
    return row | {"fit": max(fit["fit"] for fit in fits), "evidence": fits[0]["evidence"]}


def projected_rows(config: ScalingConfig, alone: Row, blocks: Row, n_bytes: tuple[int, int]) -> list[Row]:
    """Seconds on more processes, of an approximation, from its parts on one.

    Args:
        config: says for which.
        alone: the row of one process.
        blocks: see `measure_blocks`.
        n_bytes: of the sum and of the eigenvalues.
    """
    of_pass = alone["pass, CPU"] * config.n_images_projected / config.n_images
    rows = []
    for n in config.n_projected:
        loads = [0.0] * n
        for owner, seconds in zip(divided(blocks["costs"], n), blocks["seconds"], strict=True):
            loads[owner] += seconds
        sent = (n_bytes[0] * 2 * (n - 1) / n + (n_bytes[1] if n > 1 else 0)) / (config.bandwidth * 1e9)
        row: Row = {"kfac_approx": alone["kfac_approx"], "n_processes": n}
        rows.append(row | {"pass": of_pass / n, "sending": sent, "eigenvalues": max(loads)})
    return rows


def total(row: Row) -> float:
    """Seconds of a computed fit."""
    return row["pass"] + row["sending"] + row["eigenvalues"]


def as_markdown(found: dict[str, Any]) -> str:
    """Both tables, and a line for each share of the machinery."""
    parts = ["pass", "pass, CPU", "sum", "eigenvalues", "eigenvalues, CPU", "fit"]
    alone = {row["kfac_approx"]: row["fit"] for row in found["measured"] if row["n_processes"] == 1}
    lines = []
    for row in found["measured"]:
        speed_up = f"{alone[row['kfac_approx']] / row['fit']:.2f}"
        sent = [f"{row[name] / 2**20:.2f}" for name in ("sum_bytes", "eigenvalue_bytes")]
        figures = [f"{row[name]:.2f}" for name in parts]
        lines.append([row["kfac_approx"], str(row["n_processes"]), *figures, speed_up, *sent, f"{row['evidence']:.4f}"])
    header = [
        "approximation",
        "processes",
        *(f"{name} [s]" for name in parts),
        "speed-up",
        "sum [MiB]",
        "eigenvalues [MiB]",
        "evidence",
    ]
    projected = []
    for row in found["projected"]:
        first = next(r for r in found["projected"] if r["kfac_approx"] == row["kfac_approx"])
        figures = [f"{value:.3g}" for value in (row["pass"], row["sending"], row["eigenvalues"], total(row))]
        speed_up = f"{total(first) / total(row):.1f}"
        projected.append(
            [row["kfac_approx"], str(row["n_processes"]), *figures, speed_up, f"{row['eigenvalues'] / total(row):.0%}"]
        )
    titles = [
        "approximation",
        "processes",
        "pass [s]",
        "sending [s]",
        "eigenvalues [s]",
        "fit [s]",
        "speed-up",
        "eigenvalues' part",
    ]
    numbers = [n for n in found["counted"][0]["speed_up"] if n > 1]
    counted = []
    for row in found["counted"]:
        figures = [f"{row['n_weights'] / 1e6:.1f}", str(row["largest_side"]), f"{row['sum_bytes'] / 2**20:.0f}"]
        speed_ups = [f"{row['speed_up'][n]:.1f}" for n in numbers]
        counted.append([row["network"], *figures, f"{row['operations'] / 1e9:.0f}", *speed_ups])
    titles_of_counts = ["network", "weights [10⁶]", "largest side", "factors [MiB]", "eigenvalues [10⁹ operations]"]
    titles_of_counts += [f"speed-up on {n}" for n in numbers]
    shares = [f"Machinery on one process, {name}: {share:.2%} of a fit." for name, share in found["machinery"].items()]
    return "\n\n".join(
        [table(header, lines), table(titles, projected), table(titles_of_counts, counted), "\n".join(shares)]
    )


def measure_all(config: ScalingConfig) -> dict[str, Any]:
    """All that the tables say."""
    measured, projected, machinery = [], [], {}
    for approx in config.kfac_approxes:
        found = {n: on_processes(n, config, approx) for n in sorted({1, *config.n_processes})}
        rows = {n: measured_row(approx, of_each) for n, of_each in found.items()}
        measured += rows.values()
        machinery[approx] = found[1][0]["measure_machinery"]
        n_bytes = [(row["sum_bytes"], row["eigenvalue_bytes"]) for n, row in rows.items() if n > 1]
        if n_bytes:
            projected += projected_rows(config, rows[1], found[1][0]["measure_blocks"], n_bytes[0])
    return {"measured": measured, "projected": projected, "counted": counted_rows(config), "machinery": machinery}


def main() -> None:
    config = read_config(ScalingConfig, "Measure fits on several processes, and compute those on more.")
    try:
        check_config(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    found = measure_all(config)
    print(as_markdown(found))
    write_result(config, config.name, found)


if __name__ == "__main__":
    main()
