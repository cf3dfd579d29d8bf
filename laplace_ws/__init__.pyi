"""What `import laplace_ws` offers; each is imported when it is first used."""

from . import (
    calibration as calibration,
)
from . import (
    compat as compat,
)
from . import (
    curvature as curvature,
)
from . import (
    data as data,
)
from . import (
    experiment as experiment,
)
from . import (
    kfac as kfac,
)
from . import (
    likelihoods as likelihoods,
)
from . import (
    marglik as marglik,
)
from . import (
    matrices as matrices,
)
from . import (
    metrics as metrics,
)
from . import (
    models as models,
)
from . import (
    optim as optim,
)
from . import (
    posterior as posterior,
)
from . import (
    report as report,
)
from . import (
    selection as selection,
)
from ._version import __version__ as __version__
from .curvature import Backend, Curvature, kron_factors, register_backend
from .errors import (
    CurvatureWarning,
    DataWarning,
    InvalidBatchError,
    NotFittedError,
    NumericalRepairWarning,
    UnsupportedParameterError,
)
from .files import FileFormatError
from .kfac import KfacApprox, row_examples
from .likelihoods import (
    Bernoulli,
    BradleyTerry,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    likelihood_from_state,
    make_likelihood,
    register_likelihood,
)
from .marglik import marglik_training
from .matrices import Kron
from .posterior import (
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
    "BradleyTerry",
    "Categorical",
    "Curvature",
    "CurvatureWarning",
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
