"""What one tuning of the hyperparameters costs on a Wide ResNet by batch size: the fit of a batch, the decomposition, and the steps.

    python experiments/update_cost.py --config configs/update_cost.yaml

Random weights and images, as in bench_curvature. A tuning is a fit of one batch from nothing, the eigenvalues of its factors, and
Adam's steps on layerwise prior precisions. Curvlinops and ASDL have its first part; the decomposition of their factors is that by
`torch.linalg.eigh`. Every time and every peak of memory is measured in a process of its own, whose memory on a CPU is limited; what
does not fit is a line. What was measured is kept in `name.jsonl`, line by line: started again, it goes on with what is missing, and
`--report_only true` prints the table of what is there.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from bench_curvature.config import BenchConfig, BenchError, NetworkConfig, check_names
from bench_curvature.config import check_config as check_bench
from bench_curvature.run import answers, machine
from bench_curvature.summary import ratios, summarise
from bench_curvature.tables import NOTHING, spread, spread_ms, table
from bench_curvature.tuning import TUNERS
from study import KeptLines, read_config, write_result
from tqdm import tqdm

from laplace_ws.experiment.lock import sole_writer
from laplace_ws.report.style import TUNED_COLOUR, dashed_style, drawing, legend_below

Item = dict[str, Any]
Row = dict[str, Any]
COMMON = "fit and decomposition"
"""The parts that every contestant has."""
KEYS = ("network", "batch_size", "kfac_approx", "curvature", "contestant")


@dataclass(frozen=True)
class Size:
    """A Wide ResNet of the study.

    Attributes:
        depth: layers, 6n + 4.
        width: width factor.
    """

    depth: int
    width: int

    @property
    def title(self) -> str:
        """As the field writes it."""
        return f"WRN-{self.depth}-{self.width}"


@dataclass(frozen=True)
class UpdateCostConfig:
    """What is measured.

    Attributes:
        networks: Wide ResNets, by depth and width.
        batch_sizes: images of the batch.
        contestants: of ours, curvlinops, asdl.
        kfac_approxes: of reduce, expand.
        curvatures: ggn, ggn_mc (one sample), ef.
        n_hypersteps: steps of Adam.
        n_repeats: timings in a process.
        memory_gb: memory of a process on a CPU; unlimited if not given.
        device: cpu measures CPU time, cuda time between synchronisations.
        threads: of torch in each process.
        norm: of the networks: fixup, batch, group or none.
        n_classes: outputs.
        image_size: sides of the images, of 3 channels.
        seed: of weights, images and sampled labels.
        report_only: whether to print and write what is there, without further work.
        name: of the files of the results.
        out: their folder.
    """

    networks: list[Size] = field(default_factory=lambda: [Size(10, 2), Size(16, 4)])
    batch_sizes: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512, 1024, 2048])
    contestants: list[str] = field(default_factory=lambda: list(TUNERS))
    kfac_approxes: list[str] = field(default_factory=lambda: ["reduce", "expand"])
    curvatures: list[str] = field(default_factory=lambda: ["ggn", "ggn_mc", "ef"])
    n_hypersteps: int = 100
    n_repeats: int = 3
    memory_gb: float | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1
    norm: str = "none"
    n_classes: int = 10
    image_size: int = 32
    seed: int = 0
    report_only: bool = False
    name: str = "update_cost"
    out: str = "runs"

    @property
    def measured(self) -> Path:
        """The file with one line for each measurement."""
        return Path(self.out) / f"{self.name}.jsonl"


def check_config(config: UpdateCostConfig) -> None:
    """Refuse what cannot be measured, before any work.

    Raises:
        BenchError: says which value is wrong, and what is possible.
    """
    check_names("contestant", config.contestants, TUNERS)
    if config.memory_gb is not None and not config.memory_gb > 0:
        raise BenchError(f"memory_gb={config.memory_gb} must be positive")
    for key, values in (("batch_sizes", config.batch_sizes), ("n_hypersteps", [config.n_hypersteps])):
        if any(value < 1 for value in values):
            raise BenchError(f"{key} must be at least 1: {values}")
    if not config.networks:
        raise BenchError("networks is empty; name one at least, such as {depth: 10, width: 2}")
    for network in config.networks:
        cases = {"kfac_approxes": config.kfac_approxes, "curvatures": config.curvatures}
        check_bench(replace(bench_config(config, network), **cases))


def items(config: UpdateCostConfig) -> Iterator[tuple[Size, Item]]:
    """Each measurement, the small ones first."""
    for n in config.batch_sizes:
        for network in config.networks:
            for kfac_approx in config.kfac_approxes:
                for curvature in config.curvatures:
                    for contestant in config.contestants:
                        key = dict(zip(KEYS, (network.title, n, kfac_approx, curvature, contestant), strict=True))
                        options = {"n_hypersteps": config.n_hypersteps, "memory_gb": config.memory_gb}
                        for kind in ("tuning", "tuning_memory"):
                            yield network, {"kind": kind, **key, **options}


def measure(config: UpdateCostConfig) -> None:
    """Measure what is missing, each in a process of its own, and keep it at once; a memory whose time failed is not tried."""
    kept = KeptLines(config.measured)
    with tempfile.TemporaryDirectory(prefix="laplace-ws-update-") as folder:
        for network, item in tqdm(list(items(config)), unit="measurement", disable=None):
            failed = [a for a in kept.known if "error" in a and (item | {"kind": a["kind"]}).items() <= a.items()]
            if failed or any(item.items() <= answer.items() for answer in kept.known):
                continue
            for answer in answers(bench_config(config, network), [item], Path(folder)):
                kept.add(answer)


def bench_config(config: UpdateCostConfig, network: Size) -> BenchConfig:
    """What the benchmark's processes have to know."""
    sizes = NetworkConfig(network.depth, network.width, config.norm, config.n_classes, config.image_size)
    return BenchConfig(
        seed=config.seed, device=config.device, threads=config.threads, n_repeats=config.n_repeats, network=sizes
    )


def rows(config: UpdateCostConfig, measured: Sequence[Item]) -> list[Row]:
    """One row for each case of the configuration that was measured: figures, or an error."""
    found = []
    for _, item in items(config):
        if item["kind"] != "tuning":
            continue
        times, memory = ([a for a in measured if (item | {"kind": kind}).items() <= a.items()] for kind in _KINDS)
        if times:
            found.append({key: item[key] for key in KEYS} | figures(times[0], memory[0] if memory else {}))
    return found


_KINDS = ("tuning", "tuning_memory")


def figures(times: Item, memory: Item) -> Row:
    """Figures of one case: seconds of each part and of all, also in training steps, the decomposition's share, and peak memory."""
    if "error" in times:
        return {"error": times["error"]}
    parts = times["seconds"]
    whole = [sum(of_round) for of_round in zip(*parts.values(), strict=True)]
    common = [sum(of_round) for of_round in zip(parts["fit"], parts["decomposition"], strict=True)]
    summaries = {name: summarise(s) for name, s in {**parts, COMMON: common, "update": whole}.items()}
    row: Row = {
        "error": None,
        "seconds": {name: asdict(summary) for name, summary in summaries.items()},
        "training_step_seconds": asdict(summarise(times["training_seconds"])),
        "in_training_steps": asdict(summarise(ratios(whole, times["training_seconds"]))),
        "decomposition_share": summaries["decomposition"].median / summaries["update"].median,
    }
    if "error" in memory:
        return row | {"memory_error": memory["error"]}
    return row | {key: memory[key] for key in ("peak_bytes", "training_peak_bytes") if key in memory}


def as_markdown(found: Sequence[Row]) -> str:
    """The table: a line for each case."""
    header = [
        "network",
        "images",
        "approximation",
        "curvature",
        "",
        "fit [ms]",
        "decomposition [ms]",
        "hyper-steps [ms]",
    ]
    header += ["all [ms] (quartiles)", "training steps (quartiles)", "share of the decomposition", "peak [MiB]"]
    return table(header, [_line(row) for row in found])


def _line(row: Row) -> list[str]:
    key = [str(row[name]) for name in KEYS]
    if row["error"]:
        return [*key, row["error"], *[NOTHING] * 6]
    seconds = row["seconds"]
    parts = [
        f"{1e3 * seconds[name]['median']:.0f}" if name in seconds else NOTHING
        for name in ("fit", "decomposition", "hyper-steps")
    ]
    peak = f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else row.get("memory_error", NOTHING)
    all_of_it = [spread_ms(seconds["update"]), spread(row["in_training_steps"])]
    return [*key, *parts, *all_of_it, f"{row['decomposition_share']:.0%}", peak]


def picture(config: UpdateCostConfig, found: Sequence[Row]) -> bytes | None:
    """Seconds of fit and decomposition by batch size: a panel for each case, a line for each network and contestant."""
    timed = [row for row in found if not row["error"]]
    if not timed:
        return None
    n_rows, n_columns = len(config.kfac_approxes), len(config.curvatures)
    with drawing(
        1.2 + 2.6 * n_columns, 1.0 + 2.2 * n_rows, n_rows, ncols=n_columns, sharex=True, squeeze=False
    ) as drawn:
        for i, approx in enumerate(config.kfac_approxes):
            for j, curvature in enumerate(config.curvatures):
                axes = drawn.axes[i, j]
                _draw(axes, config, [r for r in timed if (r["kfac_approx"], r["curvature"]) == (approx, curvature)])
                axes.set_title(f"{approx}, {curvature}")
            drawn.axes[i, 0].set_ylabel("seconds, fit and decomposition")
        for axes in drawn.axes[-1]:
            axes.set_xlabel("images of a batch")
        legend_below(drawn.figure, drawn.axes[-1, 0])
    return drawn.svg


def _draw(axes: Any, config: UpdateCostConfig, found: Sequence[Row]) -> None:
    names = [name for name in config.contestants if name != "ours"]
    for network, linestyle in zip(config.networks, ("-", "--", ":", "-."), strict=False):
        for contestant in config.contestants:
            peer = dashed_style(names.index(contestant)) if contestant in names else None
            colour, marker = (peer.color, peer.marker) if peer else (TUNED_COLOUR, "o")
            points = [r for r in found if (r["network"], r["contestant"]) == (network.title, contestant)]
            x, y = [r["batch_size"] for r in points], [r["seconds"][COMMON]["median"] for r in points]
            axes.plot(x, y, color=colour, marker=marker, linestyle=linestyle, label=f"{contestant}, {network.title}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(config.batch_sizes, [str(n) for n in config.batch_sizes], fontsize=7)
    axes.set_yscale("log")


def report(config: UpdateCostConfig) -> None:
    """Print the table of what is there, and write table, picture and every figure of it."""
    found = rows(config, KeptLines(config.measured).known)
    print(as_markdown(found), flush=True)
    path = write_result(
        config, config.name, {"machine": machine(bench_config(config, config.networks[0])), "rows": found}
    )
    path.with_suffix(".md").write_text(as_markdown(found) + "\n")
    if svg := picture(config, found):
        path.with_suffix(".svg").write_bytes(svg)


def main() -> None:
    config = read_config(UpdateCostConfig, "Measure what one tuning of the hyperparameters costs, by batch size.")
    try:
        check_config(config)
    except BenchError as error:
        sys.exit(f"error: {error}")
    Path(config.out).mkdir(parents=True, exist_ok=True)
    if not config.report_only:
        with sole_writer(Path(config.out)):
            measure(config)
    report(config)


if __name__ == "__main__":
    main()
