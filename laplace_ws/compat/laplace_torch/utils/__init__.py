"""Names of `laplace.utils`."""

from laplace_ws.compat.laplace_torch.utils.enums import (
    HessianStructure,
    Likelihood,
    LinkApprox,
    PredType,
    PriorStructure,
    SubsetOfWeights,
    TuningMethod,
)
from laplace_ws.compat.laplace_torch.utils.feature_extractor import FeatureExtractor
from laplace_ws.compat.laplace_torch.utils.matrix import Kron, KronDecomposed
from laplace_ws.compat.laplace_torch.utils.metrics import RunningNLLMetric
from laplace_ws.compat.laplace_torch.utils.subnetmask import (
    LargestMagnitudeSubnetMask,
    LargestVarianceDiagLaplaceSubnetMask,
    LargestVarianceSWAGSubnetMask,
    LastLayerSubnetMask,
    ModuleNameSubnetMask,
    ParamNameSubnetMask,
    RandomSubnetMask,
    SubnetMask,
)
from laplace_ws.compat.laplace_torch.utils.swag import fit_diagonal_swag_var
from laplace_ws.compat.laplace_torch.utils.utils import (
    _is_batchnorm,
    _is_valid_scalar,
    block_diag,
    diagonal_add_scalar,
    expand_prior_precision,
    fix_prior_prec_structure,
    get_nll,
    invsqrt_precision,
    kron,
    normal_samples,
    parameters_per_layer,
    symeig,
    validate,
)

__all__ = [
    "FeatureExtractor",
    "HessianStructure",
    "Kron",
    "KronDecomposed",
    "LargestMagnitudeSubnetMask",
    "LargestVarianceDiagLaplaceSubnetMask",
    "LargestVarianceSWAGSubnetMask",
    "LastLayerSubnetMask",
    "Likelihood",
    "LinkApprox",
    "ModuleNameSubnetMask",
    "ParamNameSubnetMask",
    "PredType",
    "PriorStructure",
    "RandomSubnetMask",
    "RunningNLLMetric",
    "SubnetMask",
    "SubsetOfWeights",
    "TuningMethod",
    "_is_batchnorm",
    "_is_valid_scalar",
    "block_diag",
    "diagonal_add_scalar",
    "expand_prior_precision",
    "fit_diagonal_swag_var",
    "fix_prior_prec_structure",
    "get_nll",
    "invsqrt_precision",
    "kron",
    "normal_samples",
    "parameters_per_layer",
    "symeig",
    "validate",
]
