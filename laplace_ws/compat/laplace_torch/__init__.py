"""laplace-torch's names and calls: `from laplace_ws.compat.laplace_torch import Laplace` in place of `from laplace import Laplace`.

Each of its posteriors holds one of ours, `posterior`, and translates: the order of arguments, defaults, shapes, and the few numbers that
the two libraries mean differently, in which this module follows laplace-torch. `docs/from_laplace_torch.md` lists all differences.
"""

from laplace_ws.compat.laplace_torch.baselaplace import (
    BaseLaplace,
    DiagLaplace,
    FullLaplace,
    FunctionalLaplace,
    KronLaplace,
    LowRankLaplace,
    ParametricLaplace,
)
from laplace_ws.compat.laplace_torch.laplace import Laplace
from laplace_ws.compat.laplace_torch.lllaplace import (
    DiagLLLaplace,
    FullLLLaplace,
    FunctionalLLLaplace,
    KronLLLaplace,
    LLLaplace,
)
from laplace_ws.compat.laplace_torch.marglik_training import marglik_training
from laplace_ws.compat.laplace_torch.subnetlaplace import DiagSubnetLaplace, FullSubnetLaplace, SubnetLaplace
from laplace_ws.compat.laplace_torch.utils.enums import (
    HessianStructure,
    Likelihood,
    LinkApprox,
    PredType,
    PriorStructure,
    SubsetOfWeights,
    TuningMethod,
)

__all__ = [
    "BaseLaplace",
    "DiagLLLaplace",
    "DiagLaplace",
    "DiagSubnetLaplace",
    "FullLLLaplace",
    "FullLaplace",
    "FullSubnetLaplace",
    "FunctionalLLLaplace",
    "FunctionalLaplace",
    "HessianStructure",
    "KronLLLaplace",
    "KronLaplace",
    "LLLaplace",
    "Laplace",
    "Likelihood",
    "LinkApprox",
    "LowRankLaplace",
    "ParametricLaplace",
    "PredType",
    "PriorStructure",
    "SubnetLaplace",
    "SubsetOfWeights",
    "TuningMethod",
    "marglik_training",
]
