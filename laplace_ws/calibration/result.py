"""The results of a calibration run: plain numbers, under the names used in calibration.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from laplace_ws.metrics import ReliabilityCurve, RiskCoverageCurve
from laplace_ws.records import RecordError, from_dict

FORMAT_VERSION = 1

Scores = Mapping[str, float | None]
"""By the names of `laplace_ws.metrics.METRICS`; None where a value is infinite."""


@dataclass(frozen=True)
class Uncertainty:
    """Mean uncertainty of a method's predictions over its samples, in nats, see `laplace_ws.metrics.UncertaintySplit`.

    Attributes:
        total: aleatoric and epistemic.
        aleatoric: what each sample says of itself.
        epistemic: what the samples disagree about.
    """

    total: float
    aleatoric: float
    epistemic: float


@dataclass(frozen=True)
class CorruptedScores:
    """Scores on damaged test images.

    Attributes:
        corruption: how they are damaged.
        strength: from 1 to 5; 0 for the same images undamaged.
        scores: see `Scores`.
        uncertainty: of a method that has samples.
    """

    corruption: str
    strength: int
    scores: Scores
    uncertainty: Uncertainty | None = None


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
        ood: area under the ROC curve (auroc) and false positive rate at 95 % true positives (fpr95) of finding these images, with samples
            also the area by epistemic uncertainty (auroc_epistemic); None without any of these images.
        corrupted: scores on damaged images, by corruption and then strength.
        predict_seconds: wall time of predicting the test images.
        needed_seconds: wall time of all training and fitting that it needs, the network's included.
        risk_coverage: of the test images.
        uncertainty: on the test images, of a method that has samples.
        ood_uncertainty: on the out-of-distribution images likewise.
        training_runs: `needed_seconds` in units of the network's own.
        predict_cost: `predict_seconds` in units of the network's own.
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
    needed_seconds: float
    risk_coverage: RiskCoverageCurve
    uncertainty: Uncertainty | None = None
    ood_uncertainty: Uncertainty | None = None
    training_runs: float | None = None
    predict_cost: float | None = None

    def mean_corrupted(self, score: str) -> float | None:
        """Mean of a score over corruptions and strengths, undamaged images left out; None where a value is missing."""
        values = [entry.scores.get(score) for entry in self.corrupted if entry.strength]
        if not values or None in values:
            return None
        return sum(value for value in values if value is not None) / len(values)

    def corrupted_uncertainty(self) -> Uncertainty | None:
        """Mean over corruptions and strengths, undamaged images left out; None without samples or damaged images."""
        found = [entry.uncertainty for entry in self.corrupted if entry.strength and entry.uncertainty is not None]
        if not found:
            return None
        return Uncertainty(*(sum(getattr(u, f.name) for u in found) / len(found) for f in fields(Uncertainty)))


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

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> CalibrationResult:
        """What `to_dict` gave.

        Args:
            values: plain values.
            where: the file, for messages.

        Raises:
            RecordError: something is missing, or of another type.
        """
        methods = values.get("methods")
        if not isinstance(methods, dict) or not all(isinstance(method, dict) for method in methods.values()):
            raise RecordError(f"{where}: 'methods' is no object of objects; write one by method")
        listed = [
            {"name": name, "facts": _others(MethodResult, method)}
            | method
            | {
                "corrupted": [
                    {**entry, "scores": _others(CorruptedScores, entry)} for entry in method.get("corrupted", ())
                ]
            }
            for name, method in methods.items()
        ]
        return from_dict(cls, values | {"methods": listed}, where)


def _others(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are no fields of a dataclass."""
    return {key: value for key, value in values.items() if key not in {f.name for f in fields(cls)}}
