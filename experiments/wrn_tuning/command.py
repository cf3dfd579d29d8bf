"""The command of the study: train what is missing, and report what is there."""

from __future__ import annotations

import sys
from dataclasses import asdict

from study import read_config, write_result

from laplace_ws.errors import InputError
from laplace_ws.experiment.folder import make_writable
from laplace_ws.experiment.lock import FolderInUseError, sole_writer
from laplace_ws.marglik import TrainingDiverged
from wrn_tuning.config import TUNED, Row, StudyConfig, check_study, folder_of, rows_of, seeds_of
from wrn_tuning.measure import Figures, figures_path, read_figures, train_and_measure
from wrn_tuning.search import search
from wrn_tuning.table import Table, as_markdown, picture


def measured(config: StudyConfig) -> Table:
    """The figures that are there, by row."""
    found: dict[str, list[Figures]] = {}
    for row in rows_of(config):
        paths = [figures_path(config, row, seed) for seed in seeds_of(config, row)]
        if there := [read_figures(path) for path in paths if path.exists()]:
            found[row.name] = there
    return found


def finish(config: StudyConfig, row: Row, seed: int) -> Figures | None:
    """Train the network of a row and seed unless it is finished; None where a search waits for the tuned one whose time it has."""
    path = figures_path(config, row, seed)
    if path.exists():
        return read_figures(path)
    if row.budget is None:
        return train_and_measure(config, row, seed, row.weight_decay)
    tuned = figures_path(config, Row(TUNED[0]), seed)
    if not tuned.exists():
        print(
            f"{row.name}, seed {seed}: waits for {TUNED[0]}, by whose time it is measured; start again when that is finished"
        )
        return None
    found = search(config, row, seed, row.budget * read_figures(tuned).total_seconds)
    return train_and_measure(config, row, seed, found.weight_decay, found.seconds)


def finish_all(config: StudyConfig, rows: list[Row]) -> None:
    """Train what is missing, seed by seed; what another process is at is left to it, and a training that diverges is said."""
    for seed in config.seeds:
        for row in rows:
            if seed not in seeds_of(config, row):
                continue
            folder = folder_of(config, row, seed)
            make_writable(folder, "--out or --name")
            try:
                with sole_writer(folder):
                    figures = finish(config, row, seed)
            except FolderInUseError:
                print(f"{row.name}, seed {seed}: another process is at it")
                continue
            except TrainingDiverged as error:
                print(f"{row.name}, seed {seed}: {error}", file=sys.stderr)
                continue
            if figures is not None:
                minutes = figures.total_seconds / 60
                print(f"{row.name}, seed {seed}: test NLL {figures.test_nll:.3f}, {minutes:.1f} min", flush=True)


def report(config: StudyConfig) -> None:
    """Print the tables of what is there, and write every figure of it and the picture."""
    table = measured(config)
    print(as_markdown(config, table), flush=True)
    every = {name: [asdict(f) | {"total_seconds": f.total_seconds} for f in rows] for name, rows in table.items()}
    path = write_result(config, config.name, every)
    path.with_suffix(".svg").write_bytes(picture(config, table))


def main() -> None:
    """Train and report, or report alone."""
    config = read_config(StudyConfig, "Tuned prior precisions beside a sweep and a search of the weight decay.")
    try:
        rows = check_study(config)
        if not config.report_only:
            finish_all(config, list(rows))
        report(config)
    except (InputError, ValueError) as error:
        sys.exit(f"error: {error}")
