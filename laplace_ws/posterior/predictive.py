"""Predictions of a posterior: of outputs, and of what they say of the targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.curvature.backend import check_devices, evaluation_mode
from laplace_ws.curvature.checks import N_PROBED
from laplace_ws.curvature.inputs import ModelInputs, as_inputs, call_model, own_copy, without_targets
from laplace_ws.kfac.uses import at_least_float32
from laplace_ws.likelihoods import Categorical, RegressionLikelihood
from laplace_ws.matrices import Damping, Layout
from laplace_ws.posterior.fitting import FittedPosterior
from laplace_ws.posterior.functional import LinearisedModel
from laplace_ws.posterior.links import LinkApprox, bridge, probit_scaled, sample_outputs
from laplace_ws.posterior.weights import check_replaceable, weights_in_place

Prediction = Tensor | tuple[Tensor, Tensor]
"""Probabilities; or, for regression, mean and covariance."""


class PredType(str, Enum):
    """Through which model a posterior predicts.

    `GLM`: the network linearised in its weights, whose outputs are Gaussian [Immer et al. 2021]. `NN`: the network itself at weights drawn
    from the posterior.
    """

    GLM = "glm"
    NN = "nn"

    @classmethod
    def _missing_(cls, value: object) -> PredType:
        raise ValueError(f"unknown pred_type {value!r}: choose one of {', '.join(repr(m.value) for m in cls)}.")


class Predictive(FittedPosterior):
    """How a fitted posterior predicts.

    Attributes:
        memory_budget: bytes that the Jacobians of a prediction may take at a time.
    """

    memory_budget: int

    def __call__(
        self,
        x: Any,
        pred_type: str = "glm",
        link_approx: str = "probit",
        n_samples: int = 100,
        *,
        joint: bool = False,
        diagonal_output: bool = False,
        observation_noise: bool = False,
        backprop: bool = False,
        generator: torch.Generator | None = None,
    ) -> Prediction:
        """The posterior predictive of a batch; the model is run in eval mode and left as it was.

        Args:
            x: inputs, as in the batches of the fit: a tensor, a mapping, or a row (x1, x2, …) for `model(x1, x2, …)`.
            pred_type: "glm" or "nn", see `PredType`.
            link_approx: for "glm" and classes: "probit", "mc", "bridge" or "bridge_norm", see `LinkApprox`.
            n_samples: samples, for "nn" and "mc".
            joint: for regression by "glm": the covariance over all inputs and outputs.
            diagonal_output: variances alone, without the covariance between outputs; for "mc" and regression.
            observation_noise: for regression: add the variance of the observation noise, so that it is that of a target.
            backprop: keep the graph to the inputs ("native" backend), and to the weights, whose `.grad` a backward pass fills.
            generator: source of randomness; default: torch's own.

        Returns:
            For classes, probabilities in the shape of the outputs. For regression, mean `[N, D]` and covariance `[N, D, D]`; with `joint`,
            `[N·D]` and `[N·D, N·D]`; with `diagonal_output`, and for outputs of more than two dimensions, mean and variance of one shape.

        Raises:
            NotFittedError: there is no fit.
            InvalidBatchError: the inputs do not fit the model.
        """
        link = LinkApprox(link_approx)
        if not isinstance(self.likelihood, RegressionLikelihood) and (joint or observation_noise):
            raise ValueError(
                f"joint and observation_noise are for regression, not for {self.likelihood.name!r}; functional_moments(x, joint=True) "
                "gives the joint covariance of the outputs."
            )
        if PredType(pred_type) is PredType.NN:
            if joint:
                raise ValueError('joint=True needs pred_type="glm".')
            outputs = self._network_outputs(x, n_samples, generator, backprop)
            return self._mean_over_samples(outputs, diagonal_output, observation_noise)
        if diagonal_output and link in (LinkApprox.BRIDGE, LinkApprox.BRIDGE_NORM):
            raise ValueError(
                f"link_approx={link.value!r} needs the covariance of the outputs; leave out diagonal_output."
            )
        diagonal_output = diagonal_output or not self._needs_covariance(link)
        f, (spread,) = self._moments(x, [self._damping], joint, diagonal_output, backprop)
        if isinstance(self.likelihood, RegressionLikelihood):
            sigma = self.sigma_noise if observation_noise else None
            return self._of_targets(f, spread, sigma, joint=joint)
        return self._probabilities(f, spread, link, n_samples, generator)

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Float[Tensor, "S P"]:
        """Weights drawn from the posterior.

        Args:
            n_samples: S.
            generator: source of randomness; default: torch's own.
        """
        # in half precision a deviation would drown in the rounding
        dtype = torch.promote_types(self._dtype, torch.float32)
        noise = torch.randn(n_samples, self.n_params, dtype=dtype, device=self._device, generator=generator)
        return self.mean + self.H.inv_sqrt(noise, *self._damping)

    # ---------------------------------------------------------------- outputs

    def functional_moments(
        self, x: Any, *, joint: bool = False, diagonal_output: bool = False, backprop: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the outputs of the linearised network.

        Returns:
            f `[N, C]` and `[N, C, C]`; for outputs `[N, T, C]`, `[N, T, C, C]`; with `diagonal_output`, and for outputs of more dimensions,
            variances in the shape of f; with `joint`, `[N·C]` and `[N·C, N·C]`.
        """
        f, (covariance,) = self._moments(x, [self._damping], joint, diagonal_output, backprop)
        return (f.flatten(), covariance) if joint else (f, covariance)

    def functional_samples(
        self,
        x: Any,
        pred_type: str = "glm",
        n_samples: int = 100,
        *,
        joint: bool = False,
        diagonal_output: bool = False,
        backprop: bool = False,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "S N ..."]:
        """Outputs drawn from the posterior; for the arguments see `__call__`.

        Those of one sample belong together across inputs with "nn" and with `joint`, so that each sample is a function.
        """
        if PredType(pred_type) is PredType.NN:
            return self._network_outputs(x, n_samples, generator, backprop)
        f, (spread,) = self._moments(x, [self._damping], joint, diagonal_output, backprop)
        return _draw(f, spread, n_samples, generator, joint=joint)

    def predictive_samples(
        self,
        x: Any,
        pred_type: str = "glm",
        n_samples: int = 100,
        *,
        joint: bool = False,
        diagonal_output: bool = False,
        observation_noise: bool = False,
        backprop: bool = False,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "S N ..."]:
        """Class probabilities or regression means at outputs drawn from the posterior; for the arguments see `__call__`.

        With `observation_noise` (regression), targets: noise is drawn for each.
        """
        f = self.functional_samples(
            x,
            pred_type,
            n_samples,
            joint=joint,
            diagonal_output=diagonal_output,
            backprop=backprop,
            generator=generator,
        )
        mean = self.likelihood.predictive_mean(f)
        if not observation_noise:
            return mean
        if not isinstance(self.likelihood, RegressionLikelihood):
            raise ValueError(f"observation_noise is for regression, not for {self.likelihood.name!r}.")
        variance = self.likelihood.noise_variance(f, torch.zeros_like(f), self.sigma_noise.to(f.dtype))
        noise = torch.randn(mean.shape, dtype=f.dtype, device=f.device, generator=generator)
        return mean + variance.sqrt() * noise

    # ---------------------------------------------------------------- parts

    def _inputs(self, x: Any) -> ModelInputs:
        """Inputs to predict at, after all that speaks against it was raised."""
        self.H  # noqa: B018 - raises where there is no fit
        is_row = isinstance(x, (tuple, list)) and self._n_arguments > 1
        if isinstance(x, Mapping):
            x = without_targets(x, self.keys)
        inputs = as_inputs(*(x if is_row else (x,)), keys=self.keys)
        check_devices(self.model, inputs)
        self.check_weights()
        return inputs

    def _moments(
        self, x: Any, dampings: list[Damping], joint: bool, diagonal_output: bool, backprop: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Outputs, and their covariance under each damping."""
        x = self._inputs(x)
        layout = self._layout(joint, diagonal_output)
        return self._linearised(backprop).moments(x, self.H, self.H.pushforward(dampings, layout))

    def _layout(self, joint: bool, diagonal_output: bool) -> Layout:
        """Which covariances of the outputs there are."""
        if joint and diagonal_output:
            raise ValueError("joint asks for all covariances and diagonal_output for none; choose one of them.")
        n_axes = len(self._output_shape)
        is_blockwise = n_axes <= 1 or (n_axes == 2 and isinstance(self.likelihood, Categorical))
        if joint:
            return Layout.JOINT
        return Layout.EXAMPLE if is_blockwise and not diagonal_output else Layout.DIAGONAL

    def _linearised(self, backprop: bool = False) -> LinearisedModel:
        return LinearisedModel(
            self.model, self.subset, self.backend, self._check, self._output_shape, self.memory_budget, backprop
        )

    def _needs_covariance(self, link: LinkApprox) -> bool:
        """Whether variances of the outputs are not enough."""
        if isinstance(self.likelihood, RegressionLikelihood):
            return True
        if link in (LinkApprox.BRIDGE, LinkApprox.BRIDGE_NORM) and not isinstance(self.likelihood, Categorical):
            raise ValueError(f'link_approx={link.value!r} is for "classification"; use "probit" or "mc".')
        return link is not LinkApprox.PROBIT

    def _probabilities(
        self, f: Tensor, spread: Tensor, link: LinkApprox, n_samples: int, generator: torch.Generator | None
    ) -> Float[Tensor, "N ..."]:
        """E[p(y | f)] for outputs with mean f and the given covariances or variances."""
        with torch.autocast(f.device.type, enabled=False):
            if link is LinkApprox.PROBIT:
                return self.likelihood.predictive_mean(probit_scaled(f, spread))
            if link is LinkApprox.MC:
                return self.likelihood.predictive_mean(_draw(f, spread, n_samples, generator)).mean(0)
            return bridge(f, spread, normalised=link is LinkApprox.BRIDGE_NORM)

    def _of_targets(
        self, f: Tensor, spread: Tensor, sigma_noise: Tensor | None, *, joint: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the targets, given those of the outputs; with the observation noise, if σ is given."""
        likelihood = self.likelihood
        assert isinstance(likelihood, RegressionLikelihood)
        if joint:
            mean = likelihood.predictive_mean(f)
            variances = spread.diagonal().reshape(f.shape)
            # means are the first outputs, where there are others
            places = torch.arange(f.numel(), device=f.device).reshape(f.shape)
            of_means = (places if f.ndim == 1 else places[..., : mean.shape[-1]]).flatten()
            spread, mean = spread[of_means][:, of_means], mean.flatten()
        else:
            variances = spread.diagonal(dim1=-2, dim2=-1).reshape(f.shape) if spread.ndim > f.ndim else spread
            mean, spread = likelihood.moments(f, spread)
        if sigma_noise is not None:
            noise = likelihood.noise_variance(f, variances, sigma_noise.to(f.dtype))
            is_matrix = spread.ndim > mean.ndim
            spread = spread + (torch.diag_embed(noise.reshape(spread.shape[:-1])) if is_matrix else noise)
        return mean, spread

    def _network_outputs(
        self, x: Any, n_samples: int, generator: torch.Generator | None, backprop: bool
    ) -> Float[Tensor, "S N ..."]:
        """Outputs of the network at weights drawn from the posterior."""
        x = self._inputs(x)
        if n_samples < 1:
            raise ValueError(f"n_samples must be at least 1, got {n_samples}.")
        self._check_replaceable(x)
        outputs = []
        with evaluation_mode(self.model), torch.set_grad_enabled(backprop):
            for weights in self._drawn_weights(n_samples, generator):
                with weights_in_place(self.model, self.subset.tensors(self.model, weights)):
                    outputs.append(at_least_float32(call_model(self.model, own_copy(x))))
        return torch.stack(outputs)

    def _check_replaceable(self, x: ModelInputs) -> None:
        """Once a fit: raise unless the model runs on the weights that are put in place of its own."""
        if self._is_replaceable:
            return
        with evaluation_mode(self.model), self.subset.active(self.model):
            check_replaceable(self.model, x[:N_PROBED], self.subset)
        self._is_replaceable = True

    def _drawn_weights(self, n_samples: int, generator: torch.Generator | None) -> Iterator[Float[Tensor, " P"]]:
        """Samples one by one, drawn as many together as memory allows."""
        at_once = max(1, self.memory_budget // (self.n_params * 8))
        for start in range(0, n_samples, at_once):
            yield from self.sample(min(at_once, n_samples - start), generator)

    def _mean_over_samples(
        self, outputs: Float[Tensor, "S N ..."], diagonal_output: bool, observation_noise: bool
    ) -> Prediction:
        means = self.likelihood.predictive_mean(outputs)
        mean = means.mean(0)
        if not isinstance(self.likelihood, RegressionLikelihood):
            return mean
        noise = torch.zeros_like(mean)
        if observation_noise:
            sigma = self.sigma_noise.to(outputs.dtype)
            noise = self.likelihood.noise_variance(outputs, torch.zeros_like(outputs), sigma).mean(0)
        if len(means) < 2:
            raise ValueError("the variance over sampled networks needs n_samples of at least 2.")
        if diagonal_output or mean.ndim > 2:
            return mean, means.var(0) + noise
        deviations = (means - mean).reshape(len(means), len(mean), -1)
        covariance = torch.einsum("snc,snd->ncd", deviations, deviations) / (len(means) - 1)
        return mean, covariance + torch.diag_embed(noise.reshape(covariance.shape[:-1]))


def _draw(
    f: Tensor, spread: Tensor, n_samples: int, generator: torch.Generator | None, *, joint: bool = False
) -> Float[Tensor, "S N ..."]:
    """Outputs from N(f, spread), by covariances or, where it has the shape of f, variances."""
    if n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, got {n_samples}.")
    with torch.autocast(f.device.type, enabled=False):
        if joint:
            return sample_outputs(f.flatten(), spread, n_samples, generator).reshape(n_samples, *f.shape)
        if spread.shape == f.shape:
            noise = torch.randn(n_samples, *f.shape, dtype=f.dtype, device=f.device, generator=generator)
            return f + spread.clamp_min(0).sqrt() * noise  # a variance of zero may be rounded below it
        if f.ndim == 1:  # one output per example, without an axis of its own
            return sample_outputs(f[:, None], spread, n_samples, generator)[..., 0]
        return sample_outputs(f, spread, n_samples, generator)
