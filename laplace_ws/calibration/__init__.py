"""How far the probabilities of a trained network can be trusted, by the way they are made: MAP, ensembles, Laplace and others."""

from __future__ import annotations

from laplace_ws.calibration.config import CalibrateConfig, CalibrationDataConfig, MethodsConfig
from laplace_ws.calibration.result import CalibrationResult, CorruptedScores, MethodResult, Uncertainty
from laplace_ws.calibration.run import output_folder, read_result, run_calibration, write_result
from laplace_ws.calibration.table import as_text
from laplace_ws.calibration.temperature import fit_temperature

__all__ = [
    "CalibrateConfig",
    "CalibrationDataConfig",
    "CalibrationResult",
    "CorruptedScores",
    "MethodResult",
    "MethodsConfig",
    "Uncertainty",
    "as_text",
    "fit_temperature",
    "output_folder",
    "read_result",
    "run_calibration",
    "write_result",
]
