"""Predictions: of a network's outputs, and of the targets given these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.curvature.backend import evaluation_mode
from laplace_ws.curvature.inputs import ModelInputs
from laplace_ws.errors import InvalidBatchError, UnsupportedParameterError
from laplace_ws.likelihoods import Likelihood, RegressionLikelihood
from laplace_ws.likelihoods.links import LinkApprox, draw_outputs, probabilities
from laplace_ws.matrices import Damping, Layout
from laplace_ws.posterior.fit import Fit, check_network
from laplace_ws.posterior.functional import LinearisedModel, check_output_axes
from laplace_ws.posterior.linear_samples import LinearSamples
from laplace_ws.posterior.memory_needs import check_covariances, check_output_samples, check_weight_samples
from laplace_ws.posterior.network import Network
from laplace_ws.posterior.prior import Prior
from laplace_ws.posterior.routes import Route
from laplace_ws.registry import Choice
from laplace_ws.values import flag, generator_or_none, whole_number

Prediction = Tensor | tuple[Tensor, Tensor]
"""Probabilities; or, for regression, mean and covariance."""


Finite = TypeVar("Finite", Tensor, tuple[Tensor, Tensor], Prediction)


class PredType(Choice):
    """Through which model a posterior predicts.

    `GLM`: the network linearised in its weights, whose outputs are Gaussian [Immer et al. 2021]. `NN`: the network itself at weights drawn
    from the posterior.
    """

    GLM = "glm"
    NN = "nn"


@dataclass(frozen=True)
class PredictionOptions:
    """How predictions are made, see `Laplace.__call__`."""

    pred_type: PredType = PredType.GLM
    link: LinkApprox = LinkApprox.PROBIT
    n_samples: int = 100
    generator: torch.Generator | None = None
    joint: bool = False
    diagonal_output: bool = False
    observation_noise: bool = False
    backprop: bool = False

    def __post_init__(self) -> None:
        """Raise for options of a wrong type or value."""
        whole_number("n_samples", self.n_samples, least=1)
        generator_or_none("generator", self.generator)
        for name in ("joint", "diagonal_output", "observation_noise", "backprop"):
            flag(name, getattr(self, name))
        if self.by_network and self.link is not LinkApprox.PROBIT:
            raise ValueError(
                f'link_approx={self.link.value!r} is for pred_type="glm"; pred_type="nn" averages the predictions of sampled networks; '
                "leave it out."
            )

    @property
    def by_network(self) -> bool:
        """Whether networks with sampled weights predict."""
        return self.pred_type is PredType.NN


def check_link(likelihood: Likelihood, link: LinkApprox) -> None:
    """Raise `ValueError` for a way from outputs to probabilities where there are none."""
    if likelihood.is_regression and link is not LinkApprox.PROBIT:
        raise ValueError(
            f"link_approx={link.value!r} is for classes, not for {likelihood.name!r}, whose predictions are exact; leave it out."
        )


@dataclass(frozen=True)
class Predictor:
    """A posterior N(θ*, κ (s·H + Δ)⁻¹) of a network's weights, as far as predictions need it.

    Attributes:
        network: the model and its covered weights.
        fit: curvature at the mode.
        prior: hyperparameters.
        memory_budget: bytes that the Jacobians of a prediction may take at a time.
        covariance_scale: κ.
    """

    network: Network
    fit: Fit
    prior: Prior
    memory_budget: int
    covariance_scale: float = 1.0

    @property
    def damping(self) -> Damping:
        """Scale and prior precision that make up the posterior precision, both divided by κ."""
        scale, delta = self.fit.damping(self.prior)
        return scale / self.covariance_scale, delta / self.covariance_scale

    def predict(self, x: Any, options: PredictionOptions) -> Prediction:
        """The posterior predictive of a batch."""
        if self.fit.likelihood.predicts_outputs:
            return self._finite(self._output_moments(x, options))
        return self._of_targets(x, options)

    def _of_targets(self, x: Any, options: PredictionOptions) -> Prediction:
        """Probabilities of labels, or moments of regression targets."""
        likelihood, link = self.fit.likelihood, options.link
        if not likelihood.is_regression and (options.joint or options.observation_noise):
            raise ValueError(
                f"joint and observation_noise are for regression, not for {likelihood.name!r}; functional_moments(x, joint=True) "
                "gives the joint covariance of the outputs."
            )
        if options.by_network:
            if options.joint:
                raise ValueError('joint=True needs pred_type="glm".')
            return self._finite(self.mean_over_samples(self._finite_network_outputs(x, options), options))
        check_link(likelihood, link)
        needs_covariance = likelihood.needs_covariance(link.value)
        if options.diagonal_output and link in (LinkApprox.BRIDGE, LinkApprox.BRIDGE_NORM):
            raise ValueError(
                f"link_approx={link.value!r} needs the covariance of the outputs; leave out diagonal_output."
            )
        diagonal_output = options.diagonal_output or not needs_covariance
        if link is LinkApprox.MC:
            layout = self.layout(joint=False, diagonal_output=diagonal_output)
            samples = self.samples_through_weights(x, options, layout)
            if samples is not None:
                return self._finite(likelihood.predictive_mean(self._finite(samples)).mean(0))
            self._check_roots(x, options, layout)
        moments = self.moments if link is LinkApprox.MC else self._moments  # there are no draws of what is not finite
        f, spread = moments(x, joint=options.joint, diagonal_output=diagonal_output, backprop=options.backprop)
        if isinstance(likelihood, RegressionLikelihood):
            sigma = self.prior.sigma_noise if options.observation_noise else None
            return self._finite(likelihood.target_moments(f, spread, sigma, joint=options.joint))
        return self._finite(probabilities(likelihood, f, spread, link, options.n_samples, options.generator))

    def _output_moments(self, x: Any, options: PredictionOptions) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the outputs, where these are what is predicted."""
        if options.link is not LinkApprox.PROBIT or options.observation_noise:
            raise ValueError(
                f"link_approx and observation_noise are not for {self.fit.likelihood.name!r}, whose predictions are of the outputs "
                "themselves; leave them out."
            )
        if options.by_network:
            if options.joint:
                raise ValueError('joint=True needs pred_type="glm".')
            outputs = self._finite_network_outputs(x, options)
            return moments_of_samples(outputs, torch.zeros_like(outputs[0]), diagonal_output=options.diagonal_output)
        f, spread = self._moments(
            x, joint=options.joint, diagonal_output=options.diagonal_output, backprop=options.backprop
        )
        return (f.flatten(), spread) if options.joint else (f, spread)

    def point(self, x: Any, options: PredictionOptions) -> Tensor:
        """What to answer with one value: the most probable labels, or the mean of a regression, which needs no covariance."""
        likelihood = self.fit.likelihood
        if likelihood.predicts_outputs:
            return self._output_moments(x, replace(options, joint=False, diagonal_output=True))[0]
        if not isinstance(likelihood, RegressionLikelihood):
            return likelihood.most_probable(self.probabilities(x, options))
        if options.by_network:
            return self._finite(likelihood.predictive_mean(self._finite_network_outputs(x, options)).mean(0))
        check_link(likelihood, options.link)
        f = self.network.own_outputs(self.inputs(x))
        check_output_axes(self.network.model, f, self.fit.output_shape)
        return likelihood.predictive_mean(f)

    def probabilities(self, x: Any, options: PredictionOptions) -> Tensor:
        """The probabilities of classes.

        Raises:
            ValueError: it is a regression.
        """
        likelihood = self.fit.likelihood
        if likelihood.is_regression:
            raise ValueError(
                f"predict_proba is for classes, not for {likelihood.name!r}; call the posterior, which gives mean and covariance."
            )
        prediction = self._of_targets(x, options)
        assert isinstance(prediction, Tensor)
        if likelihood.predicts_outputs and prediction.shape[-1] != 2:
            raise ValueError(
                f"predict_proba of {likelihood.name!r} is which of a pair is preferred; give pairs [N, 2, …], for which the model has two "
                "outputs."
            )
        return prediction

    def sample(self, n_samples: int, generator: torch.Generator | None) -> Float[Tensor, "S P"]:
        """Weights drawn from the posterior."""
        n_samples = whole_number("n_samples", n_samples, least=1)
        check_weight_samples(n_samples, len(self.fit.mean), max(4, self.fit.mean.element_size()), self.fit.mean.device)
        return self._finite(self._draw(n_samples, generator_or_none("generator", generator)))

    def _draw(self, n_samples: int, generator: torch.Generator | None) -> Float[Tensor, "S P"]:
        noise = self._room_for_noise(n_samples).normal_(generator=generator)
        return self.fit.mean + self.fit.H.inv_sqrt(noise, *self.damping)

    def _room_for_noise(self, n_samples: int) -> Float[Tensor, "S P"]:
        """An empty tensor for as many draws of white noise: of float32 at least, as in half precision deviations drown in the rounding."""
        mean = self.fit.mean
        return mean.new_empty(n_samples, len(mean), dtype=torch.promote_types(mean.dtype, torch.float32))

    def functional_samples(self, x: Any, options: PredictionOptions) -> Float[Tensor, "S N ..."]:
        """Outputs drawn from the posterior."""
        if options.by_network:
            return self._finite_network_outputs(x, options)
        layout = self.layout(joint=options.joint, diagonal_output=options.diagonal_output)
        samples = self.samples_through_weights(x, options, layout)
        if samples is not None:
            return self._finite(samples)
        self._check_roots(x, options, layout)
        f, spread = self.moments(
            x, joint=options.joint, diagonal_output=options.diagonal_output, backprop=options.backprop
        )
        return draw_outputs(f, spread, options.n_samples, options.generator, joint=options.joint)

    def predictive_samples(self, x: Any, options: PredictionOptions) -> Float[Tensor, "S N ..."]:
        """Probabilities, or regression means, at outputs drawn from the posterior; with `observation_noise` targets."""
        likelihood = self.fit.likelihood
        f = self.functional_samples(x, options)
        mean = f if likelihood.predicts_outputs else likelihood.predictive_mean(f)
        if not options.observation_noise:
            return self._finite(mean)
        if not isinstance(likelihood, RegressionLikelihood):
            raise ValueError(f"observation_noise is for regression, not for {likelihood.name!r}.")
        variance = likelihood.noise_variance(f, torch.zeros_like(f), self.prior.sigma_noise.to(f.dtype))
        noise = torch.randn(mean.shape, dtype=f.dtype, device=f.device, generator=options.generator)
        return self._finite(mean + variance.sqrt() * noise)

    # ---------------------------------------------------------------- parts

    def inputs(self, x: Any) -> ModelInputs:
        """Inputs to predict at, once every reason not to predict has been checked and raised."""
        inputs = self._inputs_as_given(x)
        check_network(self.network, self.fit)
        return inputs

    def _inputs_as_given(self, x: Any) -> ModelInputs:
        return self.network.inputs(x, is_row=self.fit.n_arguments > 1)

    def moments(
        self, x: Any, *, joint: bool = False, diagonal_output: bool = False, backprop: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Outputs of the linearised network and their covariance or variances, see `layout`; raises unless they are finite."""
        return self._finite(self._moments(x, joint=joint, diagonal_output=diagonal_output, backprop=backprop))

    def _moments(
        self, x: Any, *, joint: bool = False, diagonal_output: bool = False, backprop: bool = False
    ) -> tuple[Tensor, Tensor]:
        layout = self.layout(joint=joint, diagonal_output=diagonal_output)
        f, (covariance,) = self.moments_under([self.damping], x, layout, backprop=backprop)
        return f, covariance

    def moments_under(
        self, dampings: list[Damping], x: Any, layout: Layout, *, backprop: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Outputs, and their covariance under each of several posterior precisions."""
        inputs = self.inputs(x)
        return self._linearised(backprop).moments(inputs, self.fit.H, self.fit.H.pushforward(dampings, layout))

    def samples_through_weights(
        self, x: Any, options: PredictionOptions, layout: Layout
    ) -> Float[Tensor, "S N ..."] | None:
        """Outputs of the linearised network at weights drawn from the posterior, finite or not, joint over examples and outputs.

        None where the way through the covariance of the outputs is cheaper (`routes.Route`), or the only one: where the graph is to be
        kept, the gradients of the model cannot be differentiated, or variances alone count, of which the draws are independent.

        Raises:
            NotEnoughMemoryError: the samples do not fit, whichever way they are made.
        """
        self._check_output_samples(x, options)
        if options.backprop or options.diagonal_output or layout is Layout.DIAGONAL:
            return None
        inputs, network = self.inputs(x), self.network
        parameters = network.parameters()
        try:
            with evaluation_mode(network.model, parameters):
                network.check.start(inputs, parameters)
        except UnsupportedParameterError:
            return None  # the other way finds another backend, or says what is wrong
        route = Route(
            self.fit.H,
            network.subset.parameter_shapes,
            network.check.positions,
            len(inputs),
            self.fit.output_shape,
            options.n_samples,
            layout,
        )
        if not route.is_through_weights or not network.can_push_forward(inputs):
            return None
        linear = LinearSamples(network, self.fit.output_shape, self.memory_budget)
        return linear.outputs(inputs, self.deviations(options.n_samples, options.generator))

    def jacobians(self, x: Any, *, backprop: bool) -> tuple[Float[Tensor, "N D P"], Float[Tensor, "N ..."]]:
        """∂f/∂θ of each example over the covered weights, and f."""
        inputs = self.inputs(x)
        return self._linearised(backprop).jacobians(inputs)

    def _linearised(self, backprop: bool = False) -> LinearisedModel:
        return LinearisedModel(self.network, self.fit.output_shape, self.memory_budget, backprop)

    def _check_output_samples(self, x: Any, options: PredictionOptions) -> None:
        """Raise `NotEnoughMemoryError` for draws of the outputs that do not fit."""
        inputs, mean = self._inputs_as_given(x), self.fit.mean
        shape, size = self._linearised().output_shape_at(inputs), max(4, mean.element_size())
        check_output_samples(options.n_samples, len(inputs), shape, size, mean.device)

    def _check_roots(self, x: Any, options: PredictionOptions, layout: Layout) -> None:
        """Raise `NotEnoughMemoryError` where the covariances of the outputs, and their roots in float64, do not fit."""
        inputs, mean = self._inputs_as_given(x), self.fit.mean
        shape = self._linearised().output_shape_at(inputs)
        check_covariances(layout, len(inputs), shape, max(4, mean.element_size()) + 8, mean.device)

    def layout(self, *, joint: bool, diagonal_output: bool) -> Layout:
        """Which covariances of the outputs there are."""
        if joint and diagonal_output:
            raise ValueError("joint asks for all covariances and diagonal_output for none; choose one of them.")
        if joint:
            return Layout.JOINT
        n_axes = len(self.fit.output_shape)
        is_blockwise = n_axes <= 1 or (n_axes == 2 and self.fit.likelihood.target_ndim == 0)
        return Layout.EXAMPLE if is_blockwise and not diagonal_output else Layout.DIAGONAL

    def network_outputs(self, x: Any, options: PredictionOptions) -> Float[Tensor, "S N ..."]:
        """Outputs of the network at weights drawn from the posterior, finite or not."""
        inputs = self.inputs(x)
        self._check_output_samples(x, options)
        weights = self._drawn_weights(options.n_samples, options.generator)
        outputs = self.network.outputs(inputs, weights, backprop=options.backprop)
        check_output_axes(self.network.model, outputs[0], self.fit.output_shape)
        return outputs

    def _finite_network_outputs(self, x: Any, options: PredictionOptions) -> Float[Tensor, "S N ..."]:
        """See `network_outputs`.

        Raises:
            InvalidBatchError: some are not finite; says whether those at the model's own weights are.
        """
        outputs = self.network_outputs(x, options)
        n_failed = len(outputs) - int(outputs.detach().flatten(1).isfinite().all(1).sum())
        if n_failed:
            self.network.own_outputs(self.inputs(x))
            raise InvalidBatchError(
                f"{n_failed} of {len(outputs)} networks with weights drawn from this posterior give outputs that are not finite; take a "
                'larger prior_precision, or pred_type="glm".'
            )
        return outputs

    def _finite(self, prediction: Finite) -> Finite:
        """A prediction, if it is finite; waits once for the device.

        Raises:
            InvalidBatchError: it is not.
        """
        parts = prediction if isinstance(prediction, tuple) else (prediction,)
        if not torch.stack([part.detach().isfinite().all() for part in parts]).all():
            raise InvalidBatchError(
                f"what the posterior of {type(self.network.model).__name__} predicts is not finite; look for infinite values and NaN in "
                "the inputs, or take a larger prior_precision."
            )
        return prediction

    def _drawn_weights(self, n_samples: int, generator: torch.Generator | None) -> Iterator[Float[Tensor, " P"]]:
        """Samples one by one."""
        for deviations in self.deviations(n_samples, generator):
            yield from self.fit.mean + deviations

    def deviations(self, n_samples: int, generator: torch.Generator | None) -> Iterator[Float[Tensor, "B P"]]:
        """Deviations of samples from the mean, drawn in batches as large as memory allows."""
        at_once = min(n_samples, max(1, self.memory_budget // (self.network.n_params * 8)))
        noise = self._room_for_noise(at_once)  # used again, as new memory takes a third of the time of a draw
        for start in range(0, n_samples, at_once):
            batch = noise[: n_samples - start].normal_(generator=generator)
            yield self.fit.H.inv_sqrt(batch, *self.damping)

    def mean_over_samples(self, outputs: Float[Tensor, "S N ..."], options: PredictionOptions) -> Prediction:
        """The predictive of networks with sampled weights, given their outputs."""
        likelihood = self.fit.likelihood
        means = likelihood.predictive_mean(outputs)
        mean = means.mean(0)
        if not isinstance(likelihood, RegressionLikelihood):
            return mean
        noise = torch.zeros_like(mean)
        if options.observation_noise:
            sigma = self.prior.sigma_noise.to(outputs.dtype)
            noise = likelihood.noise_variance(outputs, torch.zeros_like(outputs), sigma).mean(0)
        return moments_of_samples(means, noise, diagonal_output=options.diagonal_output)


def moments_of_samples(
    samples: Float[Tensor, "S N ..."], noise: Float[Tensor, "N ..."], *, diagonal_output: bool
) -> tuple[Tensor, Tensor]:
    """Mean over samples, and their covariance `[N, C, C]`, or variances in the shape of the mean, with the variance of a noise added."""
    if len(samples) < 2:
        raise ValueError("the variance over sampled networks needs n_samples of at least 2.")
    mean = samples.mean(0)
    if diagonal_output or mean.ndim > 2:
        return mean, samples.var(0) + noise
    deviations = (samples - mean).reshape(len(samples), len(mean), -1)
    covariance = torch.einsum("snc,snd->ncd", deviations, deviations) / (len(samples) - 1)
    return mean, covariance + torch.diag_embed(noise.reshape(covariance.shape[:-1]))
