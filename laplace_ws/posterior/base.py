"""The Laplace posterior: a Gaussian at the mode, its precision the curvature of the loss plus the prior's."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from laplace_ws.curvature import Backend, CurvatureSum, make_backend, parse_curvature
from laplace_ws.curvature.backend import check_devices, evaluation_mode, trainable_parameters
from laplace_ws.curvature.checks import N_PROBED, check_linearisation
from laplace_ws.curvature.compute import Batches, default_generator
from laplace_ws.errors import NotFittedError
from laplace_ws.kfac import Accumulator
from laplace_ws.likelihoods import Likelihood, make_likelihood
from laplace_ws.matrices import CurvatureMatrix
from laplace_ws.posterior.hyperparameters import PosteriorHyperparameters
from laplace_ws.posterior.optimum import optimal_prior_and_noise

FORMAT_VERSION = 1


class BaseLaplace(PosteriorHyperparameters):
    """Laplace approximation over all parameters that require grad.

    With L the summed negative log likelihood, H its curvature (sum over the data), Δ the diagonal prior precision and τ the temperature,
    the posterior is N(θ*, (H/τ + Δ)⁻¹), and the log marginal likelihood [Immer et al. 2021]

        log p(D) ≈ −L(θ*)/τ − ½ (θ*−μ)ᵀΔ(θ*−μ) − ½ [log det(H/τ + Δ) − log det Δ].

    Args:
        model: a trained network; its first input axis and first output axis run over examples.
        likelihood: "classification" (softmax), "regression" (Gaussian), "binary" (Bernoulli), or a `Likelihood`.
        prior_precision: Δ: a number, one a parameter tensor (`[len(parameter_names)]`), or one a weight (`[n_params]`; not with "kron").
        prior_mean: μ: a number, or one a weight.
        sigma_noise: standard deviation σ of the observation noise (regression); default: the likelihood's own.
        temperature: τ; the likelihood enters to the power 1/τ. A tempered class likelihood is not normalised, so values of the log marginal
            likelihood compare only at equal τ.
        curvature: "ggn", "ggn_mc" (sampled labels), "ggn_mc_rademacher" (random signs) or "ef" (empirical Fisher).
        backend: "native", "asdl", "backpack", or a `Backend`: who runs the model; the numbers are the same.
        mc_samples: random columns an example, for "ggn_mc" and "ggn_mc_rademacher".
        generator: source of the labels or signs; by default one of our own, which `torch.manual_seed` makes reproducible.

    Attributes:
        parameter_names: the parameters covered, in the order of every flat vector.
        mean: θ*, flat, after a fit.
        n_data: N, after a fit.
        n_outputs: outputs of the network for one example, after a fit.
    """

    _matrix: ClassVar[type[CurvatureMatrix]]

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        sigma_noise: float | Tensor | None = None,
        temperature: float | Tensor = 1.0,
        curvature: str = "ggn",
        backend: str | Backend = "native",
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
    ):
        parameters = trainable_parameters(model)
        first = next(iter(parameters.values()))
        self.model = model
        self.likelihood = make_likelihood(likelihood)
        self.curvature = parse_curvature(curvature)
        self.backend = make_backend(backend)
        self.mc_samples = mc_samples
        self.generator = generator or default_generator(first.device)
        self.parameter_names = tuple(parameters)
        self.shapes = {name: p.shape for name, p in parameters.items()}
        self.n_params = sum(p.numel() for p in parameters.values())
        self._dtype, self._device = first.dtype, first.device
        self.prior_precision = prior_precision
        self.prior_mean = prior_mean
        self.sigma_noise = self.likelihood.sigma_noise if sigma_noise is None else sigma_noise
        self.temperature = temperature
        self.mean = self._flat_parameters()
        self.n_data = 0
        self.n_outputs: int | None = None
        self._H: CurvatureMatrix | None = None
        self._unit_nll_sum = 0.0
        self._n_targets = 0.0

    @abstractmethod
    def _make_accumulator(self, parameters: Mapping[str, nn.Parameter]) -> Accumulator:
        """The sums that a fit takes."""

    # ---------------------------------------------------------------- fit

    def check(self, x: Tensor) -> None:
        """Run the model on one batch and raise what a fit would raise, before any work is done.

        Raises:
            UnsupportedParameterError: a parameter that requires grad cannot be covered; it is named, with the way out.
            InvalidBatchError: the batch is on another device, or the outputs do not fit.
        """
        check_devices(self.model, x)
        parameters = trainable_parameters(self.model)
        with evaluation_mode(self.model):
            uses, outputs, _ = check_linearisation(self.backend, self.model, x[:N_PROBED], parameters)
            self._make_accumulator(parameters).start_batch(uses, outputs.ndim)

    def fit(self, train_loader: Batches, *, n_data: int | None = None, progress_bar: bool = False) -> None:
        """Take the curvature at the present weights, in one pass over the data; a fit replaces the one before.

        Args:
            train_loader: iterable of batches (x, y).
            n_data: N that the data stand for, where they are a sample of a larger set: likelihood and curvature are scaled up to it.
            progress_bar: show one, if stderr is a terminal.

        Raises:
            UnsupportedParameterError: a parameter that requires grad cannot be covered.
            InvalidBatchError: the data do not fit the model or the likelihood, or are empty.
        """
        total = CurvatureSum(
            self.model,
            self.likelihood.at_noise(1.0),
            self._make_accumulator,
            curvature=self.curvature,
            backend=self.backend,
            mc_samples=self.mc_samples,
            generator=self.generator,
        )
        if tuple(total.parameters) != self.parameter_names:
            raise ValueError("other parameters require grad now than when the posterior was made; make a new one.")
        hidden = not (progress_bar and sys.stderr.isatty())
        total.add_all(tqdm(train_loader, desc="Laplace fit", unit="batch", disable=hidden))
        factor = 1.0 if n_data is None else n_data / total.n_examples
        H = total.accumulator.result()
        self._H = H if factor == 1.0 else H * factor
        self._unit_nll_sum = total.nll_sum * factor
        self._n_targets = total.n_targets * factor
        self.n_data = total.n_examples if n_data is None else n_data
        self.n_outputs = total.output_shape[-1] if total.output_shape else 1
        self.mean = self._flat_parameters()

    def _flat_parameters(self) -> Float[Tensor, " P"]:
        return torch.cat([p.detach().flatten() for p in trainable_parameters(self.model).values()])

    # ---------------------------------------------------------------- marginal likelihood

    @property
    def H(self) -> CurvatureMatrix:
        """Curvature of the summed negative log likelihood at σ = 1 and τ = 1."""
        if self._H is None:
            raise NotFittedError(f"{type(self).__name__} is not fitted yet; call fit(train_loader) first.")
        return self._H

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

    def optimal_prior_precision(self, prior_structure: str = "layerwise") -> Tensor:
        """Δ at which the log marginal likelihood of the present fit is highest, at the present σ and τ; `prior_precision` stays as it is.

        The weights of a group that are all at the prior mean ask for an infinite δ, and weights without curvature for a zero one: they get
        the upper and the lower limit in `optimum.BOUNDS`.

        Args:
            prior_structure: "scalar", "layerwise", "parameter" or "weight" (not with "kron"): which weights share one, see `prior_groups`.
        """
        return optimal_prior_and_noise(self, prior_structure, fix_noise=True)[0]

    def optimal_prior_and_noise(self, prior_structure: str = "layerwise") -> tuple[Tensor, Float[Tensor, ""]]:
        """Δ and σ at which the log marginal likelihood is highest together; otherwise as `optimal_prior_precision`."""
        return optimal_prior_and_noise(self, prior_structure, fix_noise=not self.likelihood.has_noise)

    @property
    def log_likelihood(self) -> Float[Tensor, ""]:
        """log p(D | θ*) at the present σ, in nats, untempered."""
        return -self._nll_sum(self._sigma_noise)

    def _nll_sum(self, sigma: Tensor) -> Tensor:
        self.H  # noqa: B018 - raises where there is no fit
        unit = torch.tensor(self._unit_nll_sum, dtype=torch.float64, device=self._device)
        return self.likelihood.nll_at_noise(unit, self._n_targets, sigma)

    def _scale(self, sigma: Tensor, tau: Tensor) -> Tensor:
        return self.likelihood.curvature_scale(sigma, self.curvature.value) / tau

    # ---------------------------------------------------------------- posterior

    @property
    def _damping(self) -> tuple[Tensor, Tensor]:
        """Scale s and Δ such that the posterior precision is s·H + Δ."""
        return self._scale(self._sigma_noise, self._temperature), self._prior_precision

    @property
    @abstractmethod
    def posterior_precision(self) -> Any:
        """H/τ + Δ, in the form of the structure."""

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Float[Tensor, "S P"]:
        """Weights drawn from the posterior.

        Args:
            n_samples: S.
            generator: source of randomness; default: torch's own.
        """
        noise = torch.randn(n_samples, self.n_params, dtype=self._dtype, device=self._device, generator=generator)
        return self.mean + self.H.inv_sqrt(noise, *self._damping)

    # ---------------------------------------------------------------- files

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that restore the posterior beside a model of the same parameters."""
        return {
            "format_version": FORMAT_VERSION,
            "options": self._options(),
            "shapes": {name: tuple(shape) for name, shape in self.shapes.items()},
            "mean": self.mean,
            "H": self.H.state_dict(),
            "unit_nll_sum": self._unit_nll_sum,
            "n_targets": self._n_targets,
            "n_data": self.n_data,
            "n_outputs": self.n_outputs,
            "prior_precision": self._prior_precision,
            "prior_mean": self._prior_mean,
            "sigma_noise": self._sigma_noise,
            "temperature": self._temperature,
        }

    def _options(self) -> dict[str, Any]:
        return {
            "hessian_structure": self.hessian_structure,
            "likelihood": self.likelihood.name,
            "curvature": self.curvature.value,
            "mc_samples": self.mc_samples,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a fit; the model's weights are left alone.

        Raises:
            ValueError: the state is of another format, of other options or of a model with other parameters.
        """
        if not isinstance(state, Mapping) or state.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"not a posterior of format {FORMAT_VERSION} as state_dict() gives it.")
        for option, value in self._options().items():
            if state["options"].get(option) != value:
                raise ValueError(
                    f"the saved posterior has {option}={state['options'].get(option)!r}, this one {value!r}; make this one to match."
                )
        shapes = {name: torch.Size(shape) for name, shape in state["shapes"].items()}
        if list(shapes.items()) != list(self.shapes.items()):
            differing = sorted(set(shapes.items()) ^ set(self.shapes.items()))
            which = differing[0][0] if differing else "their order"
            raise ValueError(
                f"the saved posterior is of a model with other parameters; they differ first in {which!r}."
            )
        self._H = type(self)._matrix.from_state_dict(self.shapes, _on_device(state["H"], self._device))
        self.mean = state["mean"].to(self._device, self._dtype)
        self._unit_nll_sum, self._n_targets = state["unit_nll_sum"], state["n_targets"]
        self.n_data, self.n_outputs = state["n_data"], state["n_outputs"]
        self.prior_precision, self.prior_mean = state["prior_precision"], state["prior_mean"]
        self.sigma_noise, self.temperature = state["sigma_noise"], state["temperature"]

    def __repr__(self) -> str:
        fitted = f"fitted to {self.n_data} examples" if self._H is not None else "not fitted"
        return f"{type(self).__name__}({self.likelihood.name}, {len(self.shapes)} parameters, {self.n_params} weights, {fitted})"


def _on_device(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A nested dictionary with its tensors on a device."""
    return {
        key: _on_device(value, device)
        if isinstance(value, Mapping)
        else value.to(device)
        if isinstance(value, Tensor)
        else value
        for key, value in state.items()
    }
