"""Laplace approximations and marginal likelihoods for PyTorch networks with weight sharing."""

from laplace_ws._version import __version__
from laplace_ws.curvature import Curvature, kron_factors
from laplace_ws.errors import InvalidBatchError, NotFittedError, NumericalRepairWarning, UnsupportedParameterError
from laplace_ws.files import FileFormatError
from laplace_ws.kfac import KfacApprox, row_examples
from laplace_ws.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    likelihood_from_state,
    make_likelihood,
)
from laplace_ws.marglik import marglik_training
from laplace_ws.matrices import Kron
from laplace_ws.posterior import (
    DiagLaplace,
    EkfacLaplace,
    FullLaplace,
    KronLaplace,
    Laplace,
    LowRankLaplace,
    load_posterior,
)

__all__ = [
    "Bernoulli",
    "Categorical",
    "Curvature",
    "DiagLaplace",
    "EkfacLaplace",
    "FileFormatError",
    "FullLaplace",
    "Gaussian",
    "HeteroscedasticGaussian",
    "InvalidBatchError",
    "KfacApprox",
    "Kron",
    "KronLaplace",
    "Laplace",
    "Likelihood",
    "LowRankLaplace",
    "NotFittedError",
    "NumericalRepairWarning",
    "UnsupportedParameterError",
    "__version__",
    "kron_factors",
    "likelihood_from_state",
    "load_posterior",
    "make_likelihood",
    "marglik_training",
    "row_examples",
]
