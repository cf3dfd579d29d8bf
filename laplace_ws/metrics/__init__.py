"""Scores of a classifier's predictive: likelihood, accuracy, calibration."""

from __future__ import annotations

from laplace_ws.metrics.classification import OutputKind, evaluate_classification, to_log_probs
from laplace_ws.metrics.reliability import ReliabilityCurve, reliability_curve

__all__ = ["OutputKind", "ReliabilityCurve", "evaluate_classification", "reliability_curve", "to_log_probs"]
