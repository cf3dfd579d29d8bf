"""The report of the study: a table, what each contestant reached of the targets, and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from laplace_ws.report.style import TUNED_COLOUR, dashed_style, drawing, legend_below
from train_kfac.config import TrainKfacConfig
from train_kfac.training import Record

UNITS = {"molecules": "test mean absolute error [K]", "images": "test error [%]"}


@dataclass(frozen=True)
class Row:
    """A contestant at a budget.

    Attributes:
        contestant: its name.
        role: its role.
        options: of its best trial.
        n_steps: the budget.
        scores: by seed.
        cpu_seconds: by seed.
        seconds: by seed.
    """

    contestant: str
    role: str
    options: dict[str, Any]
    n_steps: int
    scores: list[float]
    cpu_seconds: list[float]
    seconds: list[float]

    @property
    def mean(self) -> float:
        """Mean score."""
        return statistics.mean(self.scores)

    @property
    def cpu(self) -> float:
        """Mean CPU seconds."""
        return statistics.mean(self.cpu_seconds)


@dataclass(frozen=True)
class Reached:
    """The smallest budget at which the mean score of a contestant is that of another at its full one, or better.

    Attributes:
        contestant: who.
        target: whose score, and how much it is.
        n_steps: the budget; None where none does it.
        share_of_steps: of those of the other.
        share_of_time: of its CPU seconds.
    """

    contestant: str
    target: tuple[str, float]
    n_steps: int | None = None
    share_of_steps: float | None = None
    share_of_time: float | None = None


def rows_of(config: TrainKfacConfig, reported: Iterable[tuple[str, dict, int, list[Record]]]) -> list[Row]:
    """The rows of the table."""
    return [
        Row(
            name,
            config.contestants[name].role,
            options,
            n_steps,
            [r.score for r in records],
            [r.cpu_seconds for r in records],
            [r.seconds for r in records],
        )
        for name, options, n_steps, records in reported
    ]


def reached(rows: list[Row], horizon: int) -> list[Reached]:
    """What each K-FAC reached: of the best reference, and of each rival."""
    full = [row for row in rows if row.n_steps == horizon]
    references = [row for row in full if row.role == "reference"]
    targets = [min(references, key=lambda row: row.mean)] if references else []
    targets += [row for row in full if row.role == "rival"]
    found = []
    for name in dict.fromkeys(row.contestant for row in rows if row.role == "kfac"):
        own = sorted((row for row in rows if row.contestant == name), key=lambda row: row.n_steps)
        for target in targets:
            of = target.contestant, target.mean
            first = next((row for row in own if row.mean <= target.mean), None)
            if first is None:
                found.append(Reached(name, of))
            else:
                steps, time = first.n_steps / target.n_steps, first.cpu / target.cpu
                found.append(Reached(name, of, first.n_steps, steps, time))
    return found


def as_markdown(rows: list[Row], found: list[Reached], unit: str) -> str:
    """Two tables."""
    lines = [f"| optimiser | steps | {unit}, mean ± sd | of seeds | CPU seconds |", "|---|---|---|---|---|"]
    for row in rows:
        spread = f" ± {statistics.stdev(row.scores):.2f}" if len(row.scores) > 1 else ""
        lines.append(
            f"| {row.contestant} | {row.n_steps} | {row.mean:.2f}{spread} | {len(row.scores)} | {row.cpu:.0f} |"
        )
    lines += ["", "| K-FAC | target | steps | share of steps | share of CPU time |", "|---|---|---|---|---|"]
    for r in found:
        name, score = r.target
        if r.share_of_steps is None or r.share_of_time is None:
            lines.append(f"| {r.contestant} | {name}: {score:.2f} | not reached | | |")
        else:
            lines.append(
                f"| {r.contestant} | {name}: {score:.2f} | {r.n_steps} | {r.share_of_steps:.2f} | {r.share_of_time:.2f} |"
            )
    return "\n".join(lines) + "\n"


def picture(rows: list[Row], unit: str) -> bytes:
    """Score against steps, one line for each contestant, each seed a point; an SVG file."""
    with drawing(5.5, 3.8) as drawn:
        names = list(dict.fromkeys(row.contestant for row in rows))
        for i, name in enumerate(names):
            own = sorted((row for row in rows if row.contestant == name), key=lambda row: row.n_steps)
            style = dashed_style(i).line(name)
            if own[0].role == "kfac":
                style |= {"linestyle": "-", "linewidth": 2.0, "zorder": 3}
            if i == names.index(next((n for n in names if n.startswith("kfac")), name)):
                style["color"] = TUNED_COLOUR
            drawn.axes.plot([row.n_steps for row in own], [row.mean for row in own], **style)
            points = [(row.n_steps, score) for row in own for score in row.scores]
            drawn.axes.plot(*zip(*points, strict=True), ".", color=style["color"], markersize=3, alpha=0.5)
        drawn.axes.set(xlabel="steps of the training", ylabel=unit)
        legend_below(drawn.figure, drawn.axes)
    return drawn.svg


def write_report(
    config: TrainKfacConfig, reported: Iterable[tuple[str, dict, int, list[Record]]], folder: Path
) -> None:
    """Write tables, picture and all figures into a folder, and print the tables."""
    rows = rows_of(config, reported)
    if not rows:
        print("no training to report yet")
        return
    found, unit = reached(rows, config.horizon), UNITS[config.data.task]
    table = as_markdown(rows, found, unit)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train_kfac.md").write_text(table)
    (folder / "train_kfac.svg").write_bytes(picture(rows, unit))
    figures = {"config": asdict(config), "rows": [asdict(row) for row in rows], "reached": [asdict(r) for r in found]}
    (folder / "train_kfac.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"\n{table}\nwritten: {folder}/train_kfac.{{md,svg,json}}")
