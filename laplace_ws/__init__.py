"""Laplace approximations and marginal likelihoods for PyTorch networks with weight sharing."""

from laplace_ws._version import __version__
from laplace_ws.curvature import Backend, Curvature, kron_factors, register_backend
from laplace_ws.errors import (
    DataWarning,
    InvalidBatchError,
    NotFittedError,
    NumericalRepairWarning,
    UnsupportedParameterError,
)
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
    register_likelihood,
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
    Structure,
    load_posterior,
    register_structure,
)

__all__ = [
    "Backend",
    "Bernoulli",
    "Categorical",
    "Curvature",
    "DataWarning",
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
    "Structure",
    "UnsupportedParameterError",
    "__version__",
    "kron_factors",
    "likelihood_from_state",
    "load_posterior",
    "make_likelihood",
    "marglik_training",
    "register_backend",
    "register_likelihood",
    "register_structure",
    "row_examples",
]
