"""The results of a calibration run: plain numbers, under the names used in calibration.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from laplace_ws.metrics import ReliabilityCurve

FORMAT_VERSION = 1

Scores = Mapping[str, float | None]
"""By the names of `laplace_ws.metrics.METRICS`; None where a value is infinite."""


@dataclass(frozen=True)
class CorruptedScores:
    """Scores on damaged test images.

    Attributes:
        corruption: how they are damaged.
        strength: from 1 to 5; 0 for the same images undamaged.
        scores: see `Scores`.
    """

    corruption: str
    strength: int
    scores: Scores


@dataclass(frozen=True)
class MethodResult:
    """Scores of one way to predict.

    Attributes:
        name: short name.
        label: for tables and pictures.
        facts: numbers that belong to the method, see `Method`.
        test: scores on the test images.
        reliability: of the test images.
        ood_confidence: number of out-of-distribution images by bin of confidence, in the bins of `reliability`; None without any.
        ood: area under the ROC curve and false positive rate at 95 % true positives of finding these images; None without any.
        corrupted: scores on damaged images, by corruption and then strength.
        predict_seconds: wall time of predicting the test images.
    """

    name: str
    label: str
    facts: Mapping[str, Any]
    test: Scores
    reliability: ReliabilityCurve
    ood_confidence: tuple[int, ...] | None
    ood: Mapping[str, float] | None
    corrupted: tuple[CorruptedScores, ...]
    predict_seconds: float

    def mean_corrupted(self, score: str) -> float | None:
        """Mean of a score over corruptions and strengths, undamaged images left out; None where a value is missing."""
        values = [entry.scores.get(score) for entry in self.corrupted if entry.strength]
        if not values or None in values:
            return None
        return sum(value for value in values if value is not None) / len(values)


@dataclass(frozen=True)
class CalibrationResult:
    """Everything that a calibration run writes.

    Attributes:
        config: of the calibration.
        environment: versions, device and threads.
        trained: checkpoint, epoch and configuration of the network.
        data: names and numbers of images, and the parameters of the corruptions.
        methods: the network as it is, then the others.
        total_seconds: total wall time.
    """

    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    trained: Mapping[str, Any]
    data: Mapping[str, Any]
    methods: tuple[MethodResult, ...]
    total_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: methods by name, facts and scores among the entries that they belong to."""
        values = {"format_version": FORMAT_VERSION, **asdict(self)}
        values["methods"] = {
            method.pop("name"): {
                "label": method.pop("label"),
                **method.pop("facts"),
                **method,
                "corrupted": [entry | entry.pop("scores") for entry in method["corrupted"]],
            }
            for method in values["methods"]
        }
        return values
