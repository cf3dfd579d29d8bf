"""What posteriors by laplace-torch's names share: construction, fit, evidence, density and files, over one of ours."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, MutableMapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from laplace_ws.compat.laplace_torch.curvature.curvature import CurvatureInterface, loss_of
from laplace_ws.compat.laplace_torch.curvature.curvlinops import CurvlinopsGGN
from laplace_ws.compat.laplace_torch.likelihood import empirical_fisher_factor, likelihood_of
from laplace_ws.compat.laplace_torch.state import fit_of_state, merged, state_of
from laplace_ws.compat.laplace_torch.tuning import Tuning
from laplace_ws.compat.laplace_torch.utils.data import on_device
from laplace_ws.compat.laplace_torch.utils.enums import Likelihood
from laplace_ws.posterior import Laplace as Posterior


class BaseLaplace(Tuning):
    """A Laplace approximation of a network.

    Args:
        model: the network; its parameters that require grad have the posterior.
        likelihood: "classification", "regression" or "reward_modeling".
        sigma_noise: σ, for regression.
        prior_precision: δ: one, one for each parameter tensor, or one for each weight.
        prior_mean: μ: one number, or one for each weight.
        temperature: τ.
        enable_backprop: keep the graph of predictions to the inputs.
        dict_key_x, dict_key_y: entries of batches that are mappings.
        backend: a class of `curvature`, which says which curvature and which backend of ours.
        backend_kwargs: its options: `stochastic` and `num_samples`.
        asdl_fisher_kwargs: `kfac_approx` and `mc_samples`.
    """

    _key: ClassVar[tuple[str, str]]
    _structure: ClassVar[str]

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | None = None,
        backend_kwargs: MutableMapping[str, Any] | None = None,
        asdl_fisher_kwargs: MutableMapping[str, Any] | None = None,
    ) -> None:
        self.likelihood: str = Likelihood(likelihood).value
        self.model: nn.Module = model
        self._posterior: Posterior | None = None
        self.params: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
        self._set_sizes(self.params)
        self.prior_precision = prior_precision
        self.prior_mean = prior_mean
        self.sigma_noise = sigma_noise
        if self.likelihood != Likelihood.REGRESSION and self.sigma_noise != 1:
            raise ValueError(f"sigma_noise is for regression; leave it at 1 for {self.likelihood}.")
        self.temperature: float = temperature
        self.enable_backprop: bool = enable_backprop
        self.dict_key_x: str = dict_key_x
        self.dict_key_y: str = dict_key_y
        self._backend_cls: type[CurvatureInterface] = backend or CurvlinopsGGN
        self._backend_kwargs: dict[str, Any] = dict(backend_kwargs or {})
        self._asdl_fisher_kwargs: dict[str, Any] = dict(asdl_fisher_kwargs or {})
        self._backend: CurvatureInterface | None = None
        self.mean: Tensor | None = self._prior_mean

    def _set_sizes(self, parameters: list[nn.Parameter]) -> None:
        self.n_params: int | None = sum(p.numel() for p in parameters)
        self.n_layers: int | None = len(parameters)

    # ---------------------------------------------------------------- parts

    @property
    def backend(self) -> CurvatureInterface:
        """The curvature of single batches."""
        if self._backend is None:
            likelihood = "classification" if self.likelihood == Likelihood.REWARD_MODELING else self.likelihood
            keys = {"dict_key_x": self.dict_key_x, "dict_key_y": self.dict_key_y}
            self._backend = self._backend_cls(self.model, likelihood, **keys, **self._backend_kwargs)
        return self._backend

    @property
    def posterior(self) -> Posterior:
        """Our posterior, at the current hyperparameters.

        Raises:
            AttributeError: there is no fit.
        """
        if self._posterior is None:
            raise AttributeError(f"{type(self).__name__} is not fitted yet; call fit(train_loader) first.")
        prior = self._posterior.prior
        self._posterior.prior = prior.changed(
            precision=self._ordered(self.prior_precision, prior.shapes),
            mean=self._ordered(self.prior_mean, prior.shapes),
            sigma_noise=self.sigma_noise,
            temperature=self.temperature,
        )
        return self._posterior

    def _ordered(self, value: Tensor, shapes: Mapping[str, torch.Size]) -> Tensor:
        """Numbers of the weights, or one for all, in the order of our flat vectors."""
        return value

    def _new_posterior(self) -> Posterior:
        """Ours, not fitted yet."""
        return Posterior(
            self._network,
            likelihood_of(self.likelihood),
            hessian_structure=self._structure,
            dict_key_x=self.dict_key_x,
            dict_key_y=self.dict_key_y,
            **{**self._subset, **self._backend_cls.options(self._own_backend_kwargs), **self._structure_options},
        )

    @property
    def _own_backend_kwargs(self) -> dict[str, Any]:
        return self._backend_kwargs

    @property
    def _network(self) -> nn.Module:
        """What our posterior is of."""
        return self.model

    @property
    def _subset(self) -> dict[str, Any]:
        """Which weights it covers."""
        return {}

    @property
    def _structure_options(self) -> dict[str, Any]:
        sampled = self._asdl_fisher_kwargs.get("mc_samples")
        return {} if sampled is None else {"mc_samples": sampled}

    # ---------------------------------------------------------------- fit

    @property
    def loss(self) -> float | Float[Tensor, ""]:
        """Negative log likelihood at σ = 1 and τ = 1, without a Gaussian's normaliser; 0 before a fit."""
        return 0.0 if self._posterior is None else loss_of(self._posterior).to(self._dtype)

    @property
    def n_data(self) -> int:
        """Number of examples of the fit."""
        return 0 if self._posterior is None else self._posterior.n_data

    @property
    def n_outputs(self) -> int:
        """Outputs of the network."""
        return 0 if self._posterior is None else int(self._posterior.n_outputs or 0)

    def fit(self, train_loader: Any, override: bool = True, progress_bar: bool = False) -> None:
        """Compute the curvature at the current weights; the model is left in eval mode.

        Args:
            train_loader: gives pairs (x, y), or mappings.
            override: forget the last fit; else the data are added to it, whatever the weights were then.
            progress_bar: show one.
        """
        before = None if override or self._posterior is None else self._posterior.fitted
        self.model.eval()
        self._prepare(train_loader)
        data = on_device(train_loader, self._device, self.dict_key_y)
        posterior = self._new_posterior()
        posterior.fit(data, progress_bar=progress_bar)
        if before is not None:
            posterior.fitted = merged(before, posterior.fitted)
        self._posterior = posterior
        self.mean = self._weights()
        self.model.output_size = self.n_outputs  # pyright: ignore[reportArgumentType]

    def _prepare(self, train_loader: Any) -> None:
        """Find out what of the model is not known yet."""

    def _weights(self) -> Float[Tensor, " P"]:
        mean = parameters_to_vector(self.params)
        return mean if self.enable_backprop else mean.detach()

    # ---------------------------------------------------------------- evidence

    @property
    def prior_precision_diag(self) -> Float[Tensor, " P"]:
        """δ of each weight."""
        delta, sizes = self.prior_precision, torch.tensor([p.numel() for p in self._covered], device=self._device)
        n_params = int(sizes.sum())
        if len(delta) == 1:
            return delta.expand(n_params)
        if len(delta) == n_params:
            return delta
        if len(delta) == len(sizes):
            return delta.repeat_interleave(sizes)
        raise ValueError(f"prior_precision must be one number, {len(sizes)} or {n_params}, got {len(delta)}.")

    @property
    def _covered(self) -> list[nn.Parameter]:
        return self.params

    @property
    def _mode(self) -> Float[Tensor, " P"]:
        """θ* of the covered weights; the prior mean before a fit."""
        return self.prior_mean if self.mean is None else self.mean

    @property
    def log_likelihood(self) -> Float[Tensor, ""]:
        """−loss/(τσ²) − N·C·log(σ√2π), the last term for regression alone."""
        weighted = -self._H_factor * self.loss
        if self.likelihood != Likelihood.REGRESSION:
            return weighted
        return weighted - self.n_data * self.n_outputs * (self.sigma_noise * math.sqrt(2 * math.pi)).log()

    @property
    def scatter(self) -> Float[Tensor, ""]:
        """(θ*−μ)ᵀ Δ (θ*−μ)."""
        deviation = self._mode - self.prior_mean
        return (deviation * self.prior_precision_diag) @ deviation

    @property
    def log_det_prior_precision(self) -> Float[Tensor, ""]:
        """log det Δ."""
        return self.prior_precision_diag.log().sum()

    @property
    def log_det_posterior_precision(self) -> Float[Tensor, ""]:
        """log det P; that of the prior before a fit."""
        if self._posterior is None:
            return self.log_det_prior_precision
        posterior = self.posterior
        return posterior.H.log_det(*posterior.fitted.damping(posterior.prior)).to(self._dtype)

    @property
    def log_det_ratio(self) -> Float[Tensor, ""]:
        """log det P − log det Δ."""
        return self.log_det_posterior_precision - self.log_det_prior_precision

    def log_marginal_likelihood(
        self, prior_precision: Tensor | None = None, sigma_noise: Tensor | None = None
    ) -> Float[Tensor, ""]:
        """Log marginal likelihood in nats; what is passed is kept, as the posterior's own.

        Args:
            prior_precision: δ from now on.
            sigma_noise: σ from now on, for regression.
        """
        if prior_precision is not None:
            self.prior_precision = prior_precision
        if sigma_noise is not None:
            if self.likelihood != Likelihood.REGRESSION:
                raise ValueError(f"sigma_noise is for regression, not for {self.likelihood}.")
            self.sigma_noise = sigma_noise
        return self.log_likelihood - 0.5 * (self.log_det_ratio + self.scatter)


class ParametricLaplace(BaseLaplace):
    """A posterior over weights: its density, samples and files."""

    @property
    def H(self) -> Any:
        """Curvature at σ = 1 and τ = 1, in the form of the structure."""
        raise NotImplementedError

    def _init_H(self) -> None:
        """Forget the fit."""
        self._posterior = None

    def square_norm(self, value: Float[Tensor, " P"]) -> Float[Tensor, ""]:
        """(θ−θ*)ᵀ P (θ−θ*)."""
        if self._posterior is None:
            deviation = value - self._mode
            return (deviation * self.prior_precision_diag) @ deviation
        return self.posterior.square_norm(value).to(self._dtype)

    def log_prob(self, value: Float[Tensor, " P"], normalized: bool = True) -> Float[Tensor, ""]:
        """Log density; that of the prior before a fit.

        Args:
            value: θ.
            normalized: with the terms that do not depend on it.
        """
        exponent = -0.5 * self.square_norm(value)
        if not normalized:
            return exponent
        n_params = len(self.prior_precision_diag)
        return exponent + 0.5 * (self.log_det_posterior_precision - n_params * math.log(2 * math.pi))

    def functional_variance(self, Js: Float[Tensor, "N C P"]) -> Float[Tensor, "N C C"]:
        """J P⁻¹ Jᵀ of each example."""
        return self.posterior.functional_variance(Js).to(Js.dtype)

    def functional_covariance(self, Js: Float[Tensor, "N C P"]) -> Float[Tensor, "NC NC"]:
        """J P⁻¹ Jᵀ over all examples."""
        return self.posterior.functional_covariance(Js).to(Js.dtype)

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Float[Tensor, "S P"]:
        """Weights drawn from the posterior."""
        return self.posterior.sample(n_samples, generator).to(self._dtype)

    @property
    def _ef_factor(self) -> float:
        return empirical_fisher_factor(likelihood_of(self.likelihood), self._backend_cls.curvature)

    def _sorted(self, value: Tensor) -> Tensor:
        """From the order of our user's weights to that of our flat vectors, along all axes."""
        return value

    # ---------------------------------------------------------------- files

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, in laplace-torch's own form."""
        return state_of(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` of this or of laplace-torch gave.

        Raises:
            ValueError: it is of another class, likelihood or number of weights.
        """
        posterior = self._new_posterior()
        posterior.fitted = fit_of_state(self, state_dict, posterior)
        self._posterior = posterior
        self.mean: Tensor | None = state_dict["mean"]
        for name in ("prior_mean", "prior_precision", "sigma_noise"):
            setattr(self, name, state_dict[name])
        for name in ("temperature", "enable_backprop"):
            if getattr(self, name) != state_dict[name]:
                warnings.warn(
                    f"{name} was {getattr(self, name)} and is {state_dict[name]} now, as saved.", stacklevel=2
                )
            setattr(self, name, state_dict[name])
        self.model.output_size = self.n_outputs  # pyright: ignore[reportArgumentType]
