"""The rows of a calibration; to add a rival, write a file like those named here and register it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from laplace_ws.calibration import dropout, ensemble, laplace, point, swag
from laplace_ws.calibration.config import CalibrateConfig
from laplace_ws.calibration.method import Method
from laplace_ws.calibration.trained import TrainedRun
from laplace_ws.registry import Registry


def nothing_to_check(config: CalibrateConfig, trained: TrainedRun) -> None:
    """For rows that are always possible."""


@dataclass(frozen=True)
class Row:
    """A way to predict, or a family of them.

    Attributes:
        make: the methods that the configuration asks for, none where it does not; used in turn, so that they may share what they fit.
        check: raises an error of a class that `run_calibration` explains where they are asked for and impossible; before any work.
    """

    make: Callable[[CalibrateConfig, TrainedRun], Iterable[Method]]
    check: Callable[[CalibrateConfig, TrainedRun], None] = nothing_to_check


ROWS: Registry[Row] = Registry(
    "row",
    {
        "map": Row(point.map_method),
        "temperature": Row(point.temperature_method, point.check_temperature),
        "ensemble": Row(ensemble.ensemble_method, ensemble.check_ensemble),
        "mc_dropout": Row(dropout.dropout_method, dropout.check_dropout),
        "swag": Row(swag.swag_method, swag.check_swag),
        "laplace": Row(laplace.laplace_methods, laplace.check_laplace),
    },
)
"""By name, in the order of the table; the first is what the others are compared with."""


def check_rows(config: CalibrateConfig, trained: TrainedRun) -> None:
    """Reject what cannot be, before any work."""
    for row in ROWS.values():
        row.check(config, trained)


def make_methods(config: CalibrateConfig, trained: TrainedRun) -> Iterator[Method]:
    """The methods, one after another, so that one posterior is in memory at a time."""
    for row in ROWS.values():
        yield from row.make(config, trained)
