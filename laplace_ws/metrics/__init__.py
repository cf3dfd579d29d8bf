"""Scores of a classifier's predictive: likelihood, accuracy, calibration, and detection of unusual inputs."""

from __future__ import annotations

from laplace_ws.metrics.classification import OutputKind, to_log_probs
from laplace_ws.metrics.evaluation import METRICS, Metric, evaluate_classification
from laplace_ws.metrics.ood import OodScore, ood_detection, ood_scores
from laplace_ws.metrics.reliability import ReliabilityCurve, reliability_curve

__all__ = [
    "METRICS",
    "Metric",
    "OodScore",
    "OutputKind",
    "ReliabilityCurve",
    "evaluate_classification",
    "ood_detection",
    "ood_scores",
    "reliability_curve",
    "to_log_probs",
]
