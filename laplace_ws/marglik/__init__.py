"""Training with hyperparameters tuned by the marginal likelihood."""

from laplace_ws.marglik.checkpoint import CheckpointError
from laplace_ws.marglik.hyperparameters import (
    Hyperparameters,
    PriorCollapseWarning,
)
from laplace_ws.marglik.objective import neg_log_joint_mean
from laplace_ws.marglik.schedule import Schedule, TrainingDiverged
from laplace_ws.marglik.training import MarglikResult, TemperatureWarning, marglik_training

__all__ = [
    "CheckpointError",
    "Hyperparameters",
    "MarglikResult",
    "PriorCollapseWarning",
    "Schedule",
    "TemperatureWarning",
    "TrainingDiverged",
    "marglik_training",
    "neg_log_joint_mean",
]
