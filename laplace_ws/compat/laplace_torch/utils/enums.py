"""The values of options, by laplace-torch's names; each is equal to its string."""

from enum import Enum


class SubsetOfWeights(str, Enum):
    """Which weights the posterior is over."""

    ALL = "all"
    LAST_LAYER = "last_layer"
    SUBNETWORK = "subnetwork"


class HessianStructure(str, Enum):
    """Form of the curvature; a posterior in function space, "gp", is not offered here."""

    FULL = "full"
    KRON = "kron"
    DIAG = "diag"
    LOWRANK = "lowrank"
    GP = "gp"


class Likelihood(str, Enum):
    """p(y | f)."""

    REGRESSION = "regression"
    CLASSIFICATION = "classification"
    REWARD_MODELING = "reward_modeling"


class PredType(str, Enum):
    """What predicts: the linearised network, or networks with sampled weights."""

    GLM = "glm"
    NN = "nn"
    GP = "gp"


class LinkApprox(str, Enum):
    """From Gaussian outputs to class probabilities."""

    MC = "mc"
    PROBIT = "probit"
    BRIDGE = "bridge"
    BRIDGE_NORM = "bridge_norm"


class TuningMethod(str, Enum):
    """How a prior precision is chosen."""

    MARGLIK = "marglik"
    GRIDSEARCH = "gridsearch"


class PriorStructure(str, Enum):
    """Which weights share a prior precision: "layerwise" is one for each parameter tensor, our "parameter"."""

    SCALAR = "scalar"
    DIAG = "diag"
    LAYERWISE = "layerwise"
