"""Temperature scaling: one number that makes a trained classifier less confident, or more."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar
from torch import Tensor

from laplace_ws.errors import NumericalRepairWarning

LARGEST_LOG_TEMPERATURE = math.log(100.0)
_TOLERANCE = 1e-8


def fit_temperature(logits: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> float:
    """Temperature T at which softmax(f / T) gives the labels the lowest negative log likelihood [Guo et al. 2017].

    The likelihood is log-concave in 1/T, so its only optimum in log T is the best; it is searched for between 0.01 and 100.

    Args:
        logits: f, of images that the network was not trained on.
        labels: their classes.

    Warns:
        NumericalRepairWarning: the optimum is at a limit, as when every label has the largest logit.
    """
    f = logits.double()

    def nll_mean(log_t: float) -> float:
        return F.cross_entropy(f / math.exp(log_t), labels).item()

    limits = (-LARGEST_LOG_TEMPERATURE, LARGEST_LOG_TEMPERATURE)
    found: Any = minimize_scalar(nll_mean, bounds=limits, method="bounded", options={"xatol": _TOLERANCE})
    # the search never takes a limit itself, and stops short of one where the likelihood rounds to 1
    log_t = min((*limits, float(found.x)), key=nll_mean)
    if log_t in limits:
        warnings.warn(
            f"the temperature is held at its limit {math.exp(log_t):.3g}, because the negative log likelihood of the {len(labels)} "
            "validation images falls on beyond it; give more of them",
            NumericalRepairWarning,
            stacklevel=2,
        )
    return math.exp(log_t)
