"""The likelihoods behind laplace-torch's names, with its scale of the empirical Fisher."""

from __future__ import annotations

import math

from torch import Tensor

from laplace_ws.compat.laplace_torch.utils.enums import Likelihood as Name
from laplace_ws.likelihoods import BradleyTerry, Categorical, Gaussian, Likelihood

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class SquaredError(Gaussian):
    """The Gaussian likelihood, with the scale that laplace-torch gives the empirical Fisher at a noise.

    Its empirical Fisher is half the second moment of the gradients of the squared error Σ_c (f_c − y_c)². At σ = 1 this is twice that of
    −log p, and it is divided by σ² at other noises, where that of −log p is divided by σ⁴.
    """

    def curvature_scale(self, sigma_noise: Tensor, curvature: str) -> Tensor:
        """See `Likelihood.curvature_scale`."""
        return empirical_fisher_factor(self, curvature) * sigma_noise**-2


def empirical_fisher_factor(likelihood: Likelihood, curvature: str) -> float:
    """Its curvature at σ = 1 over ours."""
    return 2.0 if curvature == "ef" and isinstance(likelihood, Gaussian) else 1.0


def likelihood_of(name: Name | str) -> Likelihood:
    """Ours, by its name.

    Raises:
        ValueError: there is none of this name.
    """
    name = Name(name)
    if name is Name.REGRESSION:
        return SquaredError()
    return BradleyTerry() if name is Name.REWARD_MODELING else Categorical(ignore_index=-100)
