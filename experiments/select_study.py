"""Which criterion ranks networks as their test NLL does, over several seeds.

    python experiments/select_study.py --config configs/select_study.yaml

Each seed draws other images, initialisations and orders of batches, and compares all networks as `laplace-ws select` does, by every
criterion. Prints, for all networks and within each family, the rank correlation of each criterion with the test NLL (near −1 where it
foretells it) as mean ± standard error over the seeds with the worst seed, and by how much the test NLL of the network that it chooses
exceeds the lowest. An interrupted study goes on with the networks that are missing; `--report_only true` prints the table of what is there.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from study import read_config, write_result

from laplace_ws.experiment.records import SUMMARY, read_run
from laplace_ws.selection import CRITERIA, SelectConfig, run_selection
from laplace_ws.selection.config import CRITERIA_FOLDER
from laplace_ws.selection.ranking import correlate
from laplace_ws.selection.scores import SCORES, read_scores

FAMILIES = {"all": None, "perceptrons": True, "convolutional": False}
"""Groups of networks: whether they are perceptrons; None for either."""

Row = dict[str, Any]
"""A network of one seed: its name, whether it is a perceptron, its test NLL, and each criterion's value and seconds."""


@dataclass(frozen=True)
class StudyConfig:
    """What is compared.

    Attributes:
        seeds: one comparison each, in this order.
        select: the comparison; name and seed are completed by the seed.
        report_only: whether to print and write what is there, without further work.
        out: folder of the results.
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    select: SelectConfig = field(default_factory=SelectConfig)
    report_only: bool = False
    out: str = "runs"


def of_seed(config: StudyConfig, seed: int) -> SelectConfig:
    """The comparison of a seed."""
    return dataclasses.replace(config.select, name=f"{config.select.name}-seed{seed}", seed=seed, report=False)


def rows_of(config: SelectConfig) -> list[Row]:
    """The networks of a comparison that have finished so far."""
    rows = []
    for candidate in config.candidates:
        run, criteria = config.folder / candidate.name, config.folder / CRITERIA_FOLDER / candidate.name
        if not (run / SUMMARY).exists() or not (criteria / SCORES).exists():
            continue
        scores, result = read_scores(criteria).scores, read_run(run)
        if any(name not in scores for name in config.criteria):
            continue
        rows.append(
            {
                "name": candidate.name,
                "is_perceptron": config.run_config(candidate).model.name == "mlp",
                "test_nll": result.tuned.test_nll,
                "test_accuracy": result.tuned.test_accuracy,
                "train_seconds": result.tuned.train_seconds,
                "scores": {name: dataclasses.asdict(scores[name]) for name in config.criteria},
            }
        )
    return rows


def pairs(rows: Sequence[Row], criterion: str, is_perceptron: bool | None) -> tuple[list[float], list[float]]:
    """The values of a criterion and the test NLL of the networks of a family that have both."""
    chosen = [row for row in rows if is_perceptron is None or row["is_perceptron"] == is_perceptron]
    both = [(row["scores"][criterion]["value"], row["test_nll"]) for row in chosen]
    known = [(value, nll) for value, nll in both if value is not None and nll is not None]
    return [value for value, _ in known], [nll for _, nll in known]


def summary(table: Mapping[int, Sequence[Row]], criterion: str) -> dict[str, Any]:
    """By family, the rank correlations of a criterion and its losses in test NLL, one per seed; and its seconds for one network."""
    found: dict[str, Any] = {}
    for family, is_perceptron in FAMILIES.items():
        of_seeds = [pairs(rows, criterion, is_perceptron) for rows in table.values()]
        of_seeds = [(values, nll) for values, nll in of_seeds if values]
        correlations = [correlate(values, nll) for values, nll in of_seeds]
        found[family] = {
            "spearman": [c.spearman for c in correlations if c.spearman is not None],
            "kendall": [c.kendall for c in correlations if c.kendall is not None],
            "loss": [nll[values.index(max(values))] - min(nll) for values, nll in of_seeds],
        }
    seconds = [row["scores"][criterion]["seconds"] for rows in table.values() for row in rows]
    return found | {"seconds": statistics.mean(seconds) if seconds else None}


def repeatability(table: Mapping[int, Sequence[Row]]) -> list[float]:
    """Rank correlation of the test NLL of the networks between each two seeds: how far a seed's ranking is that of the networks at all."""
    found = []
    for first, second in itertools.combinations(table.values(), 2):
        other = {row["name"]: row["test_nll"] for row in second}
        both = [(row["test_nll"], other[row["name"]]) for row in first if row["name"] in other]
        known = [pair for pair in both if None not in pair]
        spearman = correlate([a for a, _ in known], [b for _, b in known]).spearman if known else None
        found += [] if spearman is None else [spearman]
    return found


def mean_and_worst(values: Sequence[float]) -> str:
    """Mean ± standard error over the seeds, and the worst, which is the highest; the mean alone of a single value."""
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:+.2f}"
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):+.2f} ± {error:.2f} (worst {max(values):+.2f})"


def as_markdown(config: StudyConfig, table: Mapping[int, Sequence[Row]]) -> str:
    """One line per criterion, the best mean correlation over all networks first."""
    summaries = {name: summary(table, name) for name in config.select.criteria}
    known = {name: s["all"]["spearman"] for name, s in summaries.items()}
    order = sorted(summaries, key=lambda name: statistics.mean(known[name]) if known[name] else math.inf)
    titles = ["criterion", *(f"Spearman, {family}" for family in FAMILIES), "loss of the choice [nats]", "time [s]"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for name in order:
        of = summaries[name]
        cells = [mean_and_worst(of[family]["spearman"]) for family in FAMILIES]
        seconds = "–" if of["seconds"] is None else f"{of['seconds']:.1f}"
        lines.append(
            "| " + " | ".join([CRITERIA[name].title, *cells, mean_and_worst(of["all"]["loss"]), seconds]) + " |"
        )
    counts = ", ".join(f"{len(rows)} (seed {seed})" for seed, rows in table.items())
    notes = [f"Networks: {counts} of {len(config.select.candidates)}."]
    if between := repeatability(table):
        mean = statistics.mean(between)
        notes.append(
            f"Spearman of the test NLL between two seeds: {mean:+.2f} on average, {min(between):+.2f} at least."
        )
    return "\n".join([*lines, "", *notes])


def report(config: StudyConfig) -> None:
    """Print the table of what is there, and write every figure of it."""
    table = {seed: rows for seed in config.seeds if (rows := rows_of(of_seed(config, seed)))}
    print(as_markdown(config, table), flush=True)
    summaries = {name: summary(table, name) for name in config.select.criteria}
    write_result(
        config,
        config.select.name,
        {"networks": table, "criteria": summaries, "spearman_between_seeds": repeatability(table)},
    )


def main() -> None:
    config = read_config(StudyConfig, "Rank networks by several criteria over several seeds.")
    if not config.report_only:
        for seed in config.seeds:
            run_selection(of_seed(config, seed), resume=True)
            report(config)
    else:
        report(config)


if __name__ == "__main__":
    main()
