"""The criteria by which trained networks are ranked without test images; each one registered here can be named in `criteria`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from laplace_ws.curvature import Curvature
from laplace_ws.experiment.evaluate import outputs
from laplace_ws.likelihoods import make_likelihood
from laplace_ws.registry import Registry
from laplace_ws.selection.conditional import log_joint_predictive
from laplace_ws.selection.networks import Networks, PosteriorKind

MOST_WEIGHTS_OF_FULL = 5_000
"""Largest network with a full curvature: it holds P² numbers, and re-tuning its priors inverts them several times."""
EXAMPLES_OF_JOINT = 100
"""Largest number of examples with one covariance of all their outputs, whose size is the square of their number."""


@dataclass(frozen=True)
class Criterion:
    """A number that says how well a network will predict, from its training images alone; higher is better.

    Attributes:
        title: for tables and pictures.
        value: of the networks of a candidate.
        unit: of the value; "" for none.
        decimals: of it in tables.
        kind: the posterior that it is taken from, if there is one.
        needs_part: whether a second network has to be trained, on a part of the images.
        most_weights: the largest network that has a value; None for any.
    """

    title: str
    value: Callable[[Networks], float]
    unit: str = "nats/example"
    decimals: int = 4
    kind: PosteriorKind | None = None
    needs_part: bool = False
    most_weights: int | None = None

    def covers(self, n_weights: int) -> bool:
        """Whether networks of a size have a value."""
        return self.most_weights is None or n_weights <= self.most_weights


# ------------------------------------------------------------------ of the network trained on all images


def log_marginal_likelihood(networks: Networks) -> float:
    """log p(D)/N as the training left it: by its last fit, under the priors that it tuned."""
    return networks.log_marginal_likelihood / len(networks.data.y_train)


def log_marginal_likelihood_by(networks: Networks, kind: PosteriorKind, *, retuned: bool = False) -> float:
    """log p(D)/N of a posterior, under the priors of the training or, re-tuned, those of each layer at which it is highest."""
    la = networks.posterior(kind)
    delta = la.optimal_prior_precision("layerwise") if retuned else None
    return la.log_marginal_likelihood(delta).item() / la.n_data


def train_log_likelihood(networks: Networks) -> float:
    """log p(D | θ*)/N."""
    network = networks.whole
    nll_sum = make_likelihood(networks.run.likelihood).nll_sum(outputs(network.model, network.x).double(), network.y)
    return -nll_sum.item() / len(network.y)


def fewest_weights(networks: Networks) -> float:
    """−P."""
    return -float(networks.n_weights)


# ------------------------------------------------------------------ of the network trained on a part


def validation_log_likelihood(networks: Networks) -> float:
    """log p(D_rest | θ*)/M at the weights θ* found on the part, for the M images of the rest."""
    model, (x, y) = networks.part.model, networks.rest
    return -make_likelihood(networks.run.likelihood).nll_sum(outputs(model, x).double(), y).item() / len(y)


def conditional_difference(networks: Networks) -> float:
    """(log p(D) − log p(D_part))/M: both evidences as their trainings left them, at weights and priors of their own."""
    rest = networks.rest[1]
    return (networks.log_marginal_likelihood - networks.part.log_marginal_likelihood) / len(rest)


def conditional_marginals(networks: Networks, kind: PosteriorKind) -> float:
    """Σ_n log p(y_n | D_part)/M, each image of the rest predicted by itself: linearised network, probit."""
    la, (x, y) = networks.posterior(kind, of_part=True), networks.rest
    return -la.likelihood.predictive_nll(la(x), y).item()


def conditional_joint(networks: Networks, kind: PosteriorKind) -> float:
    """log p(D_rest | D_part)/M, the images of the rest predicted together [Lotfi et al. 2022, section 5].

    Jointly within groups of `EXAMPLES_OF_JOINT` images, whose log densities are added up, as if each group knew nothing of the others; see
    `log_joint_predictive`.
    """
    la, (x, y) = networks.posterior(kind, of_part=True), networks.rest
    total = 0.0
    for x_group, y_group in zip(x.split(EXAMPLES_OF_JOINT), y.split(EXAMPLES_OF_JOINT), strict=True):
        f, covariance = la.functional_moments(x_group, joint=True)
        f = f.reshape(len(y_group), -1)
        total += log_joint_predictive(la.likelihood, f, covariance, y_group)
    return total / len(y)


# ------------------------------------------------------------------ by name

EXPAND = PosteriorKind("kron", "expand")
_KINDS = {
    "reduce": PosteriorKind("kron", "reduce"),
    "expand": EXPAND,
    "ekfac": PosteriorKind("ekfac", "expand"),
    "diag": PosteriorKind("diag"),
    "full": PosteriorKind("full"),
    "reduce_mc": PosteriorKind("kron", "reduce", Curvature.GGN_MC.value),
    "expand_mc": PosteriorKind("kron", "expand", Curvature.GGN_MC.value),
    "ekfac_mc": PosteriorKind("ekfac", "expand", Curvature.GGN_MC.value),
    "diag_mc": PosteriorKind("diag", curvature=Curvature.GGN_MC.value),
}


def _by_posterior(name: str, kind: PosteriorKind, *, retuned: bool) -> Criterion:
    words = f"log marglik, {name.replace('_mc', ' (sampled)')}{', re-tuned' if retuned else ''}"
    value = partial(log_marginal_likelihood_by, kind=kind, retuned=retuned)
    most_weights = MOST_WEIGHTS_OF_FULL if kind.structure == "full" else None
    return Criterion(words, value, kind=kind, most_weights=most_weights)


CRITERIA: Registry[Criterion] = Registry(
    "criterion",
    {
        "marglik": Criterion("log marglik", log_marginal_likelihood),
        **{f"marglik_{name}": _by_posterior(name, kind, retuned=False) for name, kind in _KINDS.items()},
        **{f"marglik_{name}_retuned": _by_posterior(name, kind, retuned=True) for name, kind in _KINDS.items()},
        "conditional_joint": Criterion(
            "conditional log marglik, joint", partial(conditional_joint, kind=EXPAND), kind=EXPAND, needs_part=True
        ),
        "conditional_marginals": Criterion(
            "conditional log marglik, marginals",
            partial(conditional_marginals, kind=EXPAND),
            kind=EXPAND,
            needs_part=True,
        ),
        "conditional_difference": Criterion(
            "conditional log marglik, difference", conditional_difference, needs_part=True
        ),
        "train_log_likelihood": Criterion("training log likelihood", train_log_likelihood),
        "validation_log_likelihood": Criterion("validation log likelihood", validation_log_likelihood, needs_part=True),
        "fewest_weights": Criterion("fewest weights", fewest_weights, unit="", decimals=0),
    },
)
"""Criteria by name."""
