"""What the study trains: its configuration, its rows, and the run of each row and seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from laplace_ws.curvature import Curvature
from laplace_ws.errors import InputError
from laplace_ws.experiment.config import RunConfig, TrainingConfig
from laplace_ws.options import OneOf
from laplace_ws.registry import unknown_name

TUNED = ("reduce", "expand")
"""Rows whose prior precisions are tuned, by the approximation that tunes them."""
RUN = "run"


class StudyError(InputError):
    """The configuration does not allow the study; the message says how to mend it."""


@dataclass(frozen=True)
class SearchConfig:
    """A search of the weight decay by Optuna: TPE, with pruning by the median, on training images that it leaves out.

    Attributes:
        seed: the one seed on which it is made.
        budgets: one search each: its CPU time in multiples of that of the training tuned by reduce.
        n_validation: training images that judge, by their NLL.
        lowest: end of the interval of the weight decay, whose logarithm is uniform.
        highest: the other end.
    """

    seed: int = 0
    budgets: list[float] = field(default_factory=list)
    n_validation: int = 500
    lowest: float = 1.6e-5
    highest: float = 5e-2


@dataclass(frozen=True)
class StudyConfig(TrainingConfig):
    """One study; what is not of its own is as in a training run, whose name and seed are completed by row and seed.

    Attributes:
        seeds: of initialisation, order and choice of images.
        weight_decays: fixed ones, one row each; the prior precision is the weight decay times the number of images.
        search: of the weight decay.
        evidence_curvature: of the evidences in the table.
        rows: those that this process trains: reduce, expand, wd-5e-04 and so on, optuna-1 and so on; all if not given.
        report_only: whether to print and write what is there, without further work.
        title: of the data, in the table.
    """

    name: str = "wrn_tuning"
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    weight_decays: list[float] = field(default_factory=list)
    search: SearchConfig = field(default_factory=SearchConfig)
    evidence_curvature: OneOf[Curvature] = Curvature.GGN.value
    rows: list[str] | None = None
    report_only: bool = False
    title: str = "images"


@dataclass(frozen=True)
class Row:
    """One way to come to a weight decay.

    Attributes:
        name: of the row.
        weight_decay: a fixed one; None where it is tuned or searched for.
        budget: of a search; None without one.
    """

    name: str
    weight_decay: float | None = None
    budget: float | None = None

    @property
    def approx(self) -> str:
        """The approximation of the row's own evidence."""
        return self.name if self.name in TUNED else "expand"


def rows_of(config: StudyConfig) -> list[Row]:
    """All rows of the table, in order."""
    fixed = [Row(f"wd-{decay:.0e}", weight_decay=decay) for decay in config.weight_decays]
    searched = [Row(f"optuna-{budget:g}", budget=budget) for budget in config.search.budgets]
    return [*(Row(name) for name in TUNED), *fixed, *searched]


def seeds_of(config: StudyConfig, row: Row) -> list[int]:
    """The seeds of a row: a search has one."""
    return [seed for seed in config.seeds if row.budget is None or seed == config.search.seed]


def chosen_rows(config: StudyConfig) -> list[Row]:
    """The rows that this process trains.

    Raises:
        StudyError: a row is not known, or two have one name.
    """
    rows: dict[str, Row] = {}
    for row in rows_of(config):
        if row.name in rows:
            raise StudyError(
                f"two rows have one name, '{row.name}'; give weight_decays and search.budgets that differ in their first digit"
            )
        rows[row.name] = row
    for name in config.rows or []:
        if name not in rows:
            raise StudyError(str(unknown_name("row", name, rows)))
    return [row for name, row in rows.items() if config.rows is None or name in config.rows]


def folder_of(config: StudyConfig, row: Row, seed: int) -> Path:
    """The folder of a row and seed; the run lies in it, in a folder of its own."""
    return config.folder / f"{row.name}-seed{seed}"


def run_of(config: StudyConfig, row: Row, seed: int, weight_decay: float | None) -> RunConfig:
    """The training of a row, at a weight decay that is given or was found by a search, or None where it is tuned."""
    shared: dict[str, Any] = {f.name: getattr(config, f.name) for f in fields(TrainingConfig)}
    marglik = replace(config.marglik, kfac_approx=row.approx, final_kfac_approx=row.approx)
    if weight_decay is not None:
        marglik = replace(marglik, n_hypersteps=0, prior_prec_init=weight_decay * n_train_of(config))
    own = {"out": str(folder_of(config, row, seed)), "name": RUN, "seed": seed, "workers": 1, "report": False}
    return RunConfig(**{**shared, **own, "marglik": marglik})


def n_train_of(config: StudyConfig) -> int:
    """Number of training images.

    Raises:
        StudyError: it is not given.
    """
    if config.data.n_train is None:
        raise StudyError("data.n_train is missing; give the number of training images")
    return config.data.n_train


def check_study(config: StudyConfig) -> Sequence[Row]:
    """The rows that this process trains, once the configuration is seen to be valid.

    Raises:
        StudyError: says which value is wrong.
    """
    if config.device != "cpu":
        raise StudyError(f"device={config.device}, but the study compares CPU times; use device=cpu")
    m, n_train = config.marglik, n_train_of(config)
    if m.marglik_frequency == 1 and m.n_epochs_burnin in (0, 1):
        raise StudyError(
            "every epoch tunes, so that none has the time of gradient steps alone; set marglik.n_epochs_burnin=2"
        )
    if not 0 < config.search.lowest < config.search.highest:
        raise StudyError(
            f"search.lowest={config.search.lowest} must be positive and below search.highest={config.search.highest}"
        )
    if config.search.budgets and not 0 < config.search.n_validation < n_train:
        raise StudyError(
            f"search.n_validation={config.search.n_validation} must be positive and below data.n_train={n_train}"
        )
    for name in ("weight_decays", "search.budgets"):
        values = config.weight_decays if name == "weight_decays" else config.search.budgets
        if any(not value > 0 for value in values):
            raise StudyError(f"{name} must be positive: {values}")
    return chosen_rows(config)
