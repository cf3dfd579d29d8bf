"""The plots of a training run's report; to add one, write a function and register it here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from laplace_ws.registry import Choice, Registry
from laplace_ws.report.precision_pictures import final_precision, precision_over_epochs
from laplace_ws.report.records import RunRecord
from laplace_ws.report.reliability_pictures import model_reliability_pictures
from laplace_ws.report.style import Picture
from laplace_ws.report.training_pictures import value_over_epochs


class Section(Choice):
    """A section of the report that shows plots."""

    TRAINING = "training"
    PRECISION = "precision"
    CALIBRATION = "calibration"


@dataclass(frozen=True)
class Plot:
    """A plot of the report.

    Attributes:
        section: where it appears.
        draw: the pictures of a run; none where there is nothing to draw.
    """

    section: Section
    draw: Callable[[RunRecord], Iterable[Picture]]


PLOTS: Registry[Plot] = Registry(
    "plot",
    {
        "log_marginal_likelihood": Plot(
            Section.TRAINING,
            partial(
                value_over_epochs,
                "log_marginal_likelihood",
                "Log marginal likelihood",
                "log marginal likelihood [nats]",
                higher_is_better=True,
            ),
        ),
        "train_nll": Plot(
            Section.TRAINING, partial(value_over_epochs, "train_nll", "Training loss", "training NLL [nats/example]")
        ),
        "test_nll": Plot(
            Section.TRAINING, partial(value_over_epochs, "test_nll", "Test NLL", "test NLL [nats/example]")
        ),
        "prior_precision_over_epochs": Plot(Section.PRECISION, precision_over_epochs),
        "final_prior_precision": Plot(Section.PRECISION, final_precision),
        "reliability": Plot(Section.CALIBRATION, model_reliability_pictures),
    },
)
"""By name; sections show their pictures in this order."""


def pictures_by_section(record: RunRecord) -> dict[str, list[Picture]]:
    """The pictures of every section."""
    pictures: dict[str, list[Picture]] = {section.value: [] for section in Section}
    for plot in PLOTS.values():
        pictures[plot.section.value] += plot.draw(record)
    return pictures
