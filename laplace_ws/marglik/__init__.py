"""Training with hyperparameters tuned by the marginal likelihood."""

from laplace_ws.marglik.checkpoint import CheckpointError
from laplace_ws.marglik.hyperparameters import (
    Hyperparameters,
    PriorCollapseWarning,
    TemperatureWarning,
)
from laplace_ws.marglik.objective import neg_log_joint_mean
from laplace_ws.marglik.options import TrainingOptions
from laplace_ws.marglik.result import MarglikResult
from laplace_ws.marglik.schedule import Schedule, TrainingDiverged
from laplace_ws.marglik.trainer import Trainer
from laplace_ws.marglik.training import marglik_training, prepare

__all__ = [
    "CheckpointError",
    "Hyperparameters",
    "MarglikResult",
    "PriorCollapseWarning",
    "Schedule",
    "TemperatureWarning",
    "Trainer",
    "TrainingDiverged",
    "TrainingOptions",
    "marglik_training",
    "neg_log_joint_mean",
    "prepare",
]
