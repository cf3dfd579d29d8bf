"""Scores of a classifier's predictive: likelihood, accuracy, calibration, and detection of unusual inputs."""

from __future__ import annotations

from laplace_ws.metrics.classification import OutputKind, to_log_probs
from laplace_ws.metrics.evaluation import METRICS, Metric, evaluate_classification
from laplace_ws.metrics.ood import OodScore, ood_detection, ood_scores
from laplace_ws.metrics.reliability import ReliabilityCurve, reliability_curve
from laplace_ws.metrics.selective import RiskCoverageCurve, aurc, risk_coverage_curve
from laplace_ws.metrics.uncertainty import UncertaintySplit, uncertainty_split

__all__ = [
    "METRICS",
    "Metric",
    "OodScore",
    "OutputKind",
    "ReliabilityCurve",
    "RiskCoverageCurve",
    "UncertaintySplit",
    "aurc",
    "evaluate_classification",
    "ood_detection",
    "ood_scores",
    "reliability_curve",
    "risk_coverage_curve",
    "to_log_probs",
    "uncertainty_split",
]
