"""The Laplace posterior: a Gaussian at the mode, its precision the curvature of the loss plus the prior's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from laplace_ws.curvature import Backend, Curvature, make_backend
from laplace_ws.curvature.backend import trainable_parameters
from laplace_ws.curvature.curvature_sum import default_generator
from laplace_ws.curvature.inputs import BatchKeys
from laplace_ws.files import save_tensors
from laplace_ws.likelihoods import Likelihood, make_likelihood
from laplace_ws.matrices import CurvatureMatrix
from laplace_ws.posterior.files import posterior_state, restore_posterior
from laplace_ws.posterior.fitting import FitSums
from laplace_ws.posterior.precision import PosteriorPrecision
from laplace_ws.posterior.subset import WeightSubset, make_subset
from laplace_ws.posterior.tuning import TunedPrior


class BaseLaplace(TunedPrior):
    """Laplace approximation over weights of a network: all that require grad, or some of them.

    With L the summed negative log likelihood, H its curvature (sum over the data), Δ the diagonal prior precision and τ the temperature,
    the posterior is N(θ*, (H/τ + Δ)⁻¹), and the log marginal likelihood [Immer et al. 2021]

        log p(D) ≈ −L(θ*)/τ − ½ (θ*−μ)ᵀΔ(θ*−μ) − ½ [log det(H/τ + Δ) − log det Δ].

    Args:
        model: a trained network; its first input axis and first output axis run over examples.
        likelihood: "classification" (softmax), "regression" (Gaussian), "heteroscedastic_regression", "binary" (Bernoulli, multi-label), or
            a `Likelihood`.
        subset_of_weights: "all", "last_layer", "subnetwork", patterns of names of parameters or modules, as in `["head", "*.bias"]`, or a
            `WeightSubset`. Parameters that do not require grad are left out of each.
        last_layer_name: the module that is the last layer; by default the last one that holds parameters, which a fit checks.
        subnetwork_indices: for "subnetwork", places in the flat vector of all weights that require grad, see `posterior.subnetwork`;
            for "diag" and "full".
        prior_precision: Δ: a number, one per parameter tensor (`[len(parameter_names)]`), or one per weight (`[n_params]`; not with "kron"
            and "ekfac").
        prior_mean: μ: a number, or one per weight.
        sigma_noise: standard deviation σ of the observation noise (regression); default: the likelihood's own.
        temperature: τ; the likelihood enters to the power 1/τ. A tempered class likelihood is not normalised, so values of the log marginal
            likelihood compare only at equal τ.
        curvature: "ggn", "ggn_mc" (sampled labels), "ggn_mc_rademacher" (random signs) or "ef" (empirical Fisher).
        backend: "native", "asdl", "backpack", or a `Backend`: who runs the model; the numbers are the same.
        mc_samples: random columns per example, for "ggn_mc" and "ggn_mc_rademacher".
        generator: source of the labels or signs; by default one of our own, which `torch.manual_seed` makes reproducible.
        dict_key_x: of batches that are mappings, the entry that tells the number of examples and the device.
        dict_key_y: of batches that are mappings, the targets.
        memory_budget: bytes that the Jacobians of a prediction may take at a time, which decides how many examples are worked on at once.
        class_names: names of the classes or outputs, kept in files.

    Attributes:
        parameter_names: the parameters covered, in the order of every flat vector.
        shapes: shape of what is covered of each.
        mean: θ*, flat, after a fit.
        n_data: N, after a fit.
        n_outputs: outputs of the network for one example (and term), after a fit.
    """

    _matrix: ClassVar[type[CurvatureMatrix]]
    _covers_single_weights: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        subset_of_weights: str | Sequence[str] | WeightSubset = "all",
        last_layer_name: str | None = None,
        subnetwork_indices: Int[Tensor, " D"] | None = None,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        sigma_noise: float | Tensor | None = None,
        temperature: float | Tensor = 1.0,
        curvature: str = "ggn",
        backend: str | Backend = "native",
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
        dict_key_x: str = BatchKeys.x,
        dict_key_y: str = BatchKeys.y,
        memory_budget: int = 2**28,
        class_names: Sequence[str] | None = None,
    ):
        for name, value in (("mc_samples", mc_samples), ("memory_budget", memory_budget)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if isinstance(subset_of_weights, WeightSubset):
            if last_layer_name is not None or subnetwork_indices is not None:
                raise ValueError("a WeightSubset says all; leave out last_layer_name and subnetwork_indices.")
            self.subset = subset_of_weights
        else:
            self.subset = make_subset(
                model, subset_of_weights, last_layer_name=last_layer_name, subnetwork_indices=subnetwork_indices
            )
        if self.subset.selection and not self._covers_single_weights:
            raise ValueError(
                f'hessian_structure={self.hessian_structure!r} covers parameters whole; a subnetwork needs "diag" or "full".'
            )
        # what could be the last layer, where which of it is has been guessed
        is_guess = subset_of_weights == "last_layer" and last_layer_name is None
        self._trained = frozenset(trainable_parameters(model)) if is_guess else frozenset()
        parameters = self.subset.parameters(model)
        first = next(iter(parameters.values()))
        self.model = model
        self.likelihood = make_likelihood(likelihood)
        self.curvature = Curvature(curvature)
        self.backend = make_backend(backend)
        self.mc_samples = mc_samples
        self.generator = generator or default_generator(first.device)
        self.keys = BatchKeys(dict_key_x, dict_key_y)
        self.memory_budget = memory_budget
        self.class_names = None if class_names is None else tuple(class_names)
        self.parameter_names = tuple(parameters)
        self.shapes = self.subset.shapes
        self.n_params = sum(shape.numel() for shape in self.shapes.values())
        self._dtype, self._device = first.dtype, first.device
        self.prior_precision = prior_precision
        self.prior_mean = prior_mean
        self.sigma_noise = self.likelihood.sigma_noise if sigma_noise is None else sigma_noise
        self.temperature = temperature
        self.mean = self.subset.flat(model)
        self._sums: FitSums | None = None
        self._fitted_options: dict[str, Any] = {}
        self._n_arguments = 1
        self._surroundings = [], torch.zeros(0, 2, dtype=torch.float64)

    # ---------------------------------------------------------------- marginal likelihood

    def log_marginal_likelihood(
        self,
        prior_precision: float | Tensor | None = None,
        sigma_noise: float | Tensor | None = None,
        temperature: float | Tensor | None = None,
    ) -> Float[Tensor, ""]:
        """Laplace approximation of log p(D) in nats, float64, differentiable in what is passed; needs no pass over the data.

        Args:
            prior_precision: Δ in place of the posterior's own, which stays as it is.
            sigma_noise: σ in place of the posterior's own.
            temperature: τ in place of the posterior's own.
        """
        delta = self._prior_precision if prior_precision is None else self._check_prior_precision(prior_precision)
        sigma = self._sigma_noise if sigma_noise is None else self._check_sigma_noise(sigma_noise)
        tau = self._temperature if temperature is None else self._check_positive_scalar("temperature", temperature)
        log_det_prior, penalty = self._prior_terms(delta)
        log_det_ratio = self.H.log_det(self._scale(sigma, tau), delta) - log_det_prior
        return -self._nll_sum(sigma) / tau - 0.5 * penalty - 0.5 * log_det_ratio

    @property
    def log_likelihood(self) -> Float[Tensor, ""]:
        """log p(D | θ*) at the present σ, in nats, untempered."""
        return -self._nll_sum(self._sigma_noise)

    # ---------------------------------------------------------------- posterior

    @property
    def posterior_precision(self) -> Any:
        """H/τ + Δ, in the form of the structure."""
        return PosteriorPrecision(self.H, *self._damping)

    # ---------------------------------------------------------------- files

    def _options(self) -> dict[str, Any]:
        """Options that fits must share to be added up, and that a saved posterior must share to be loaded."""
        return {
            "hessian_structure": self.hessian_structure,
            "likelihood": self.likelihood.at_noise(1.0).state(),
            "curvature": self.curvature.value,
            "mc_samples": self.mc_samples,
        }

    @property
    def options(self) -> dict[str, Any]:
        """Options that fits must share to be added up, as plain values."""
        return self._options()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that restore the posterior beside a model of the same parameters; see `files.posterior_state`."""
        return posterior_state(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a fit; the model's weights are left alone, see `load_mean`.

        Raises:
            FileFormatError: it is no posterior, or one of another format.
            ValueError: it is of other options, or of a model with other parameters.
        """
        restore_posterior(self, state)

    def save(self, path: str | Path) -> None:
        """Write `state_dict()` to a file, which `load_posterior` and `torch.load(path, weights_only=True)` read."""
        save_tensors(path, self.state_dict())

    def __repr__(self) -> str:
        fitted = f"fitted to {self.n_data} examples" if self._sums is not None else "not fitted"
        return f"{type(self).__name__}({self.likelihood.name}, {len(self.shapes)} parameters, {self.n_params} weights, {fitted})"
