"""`Laplace`: a Gaussian posterior at the mode; its precision is the curvature of the loss plus the prior precision."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from laplace_ws.curvature import Backend, Curvature, make_backend
from laplace_ws.curvature.backend import trainable_parameters
from laplace_ws.curvature.batches import Batches, Data
from laplace_ws.curvature.curvature_sum import default_generator
from laplace_ws.curvature.inputs import BatchKeys
from laplace_ws.curvature.models import check_visible
from laplace_ws.distributed import processes
from laplace_ws.errors import NotFittedError
from laplace_ws.files import save_tensors
from laplace_ws.likelihoods import Likelihood, make_likelihood
from laplace_ws.likelihoods.links import LinkApprox
from laplace_ws.matrices import CurvatureMatrix
from laplace_ws.posterior import files
from laplace_ws.posterior.averages import (
    CurvatureAverages,
    check_averages,
    check_source,
    covered_blocks,
    fit_of_averages,
    structure_of,
)
from laplace_ws.posterior.density import WeightDensity
from laplace_ws.posterior.evidence import log_marginal_likelihood, optimal_prior_and_noise
from laplace_ws.posterior.fit import Fit, all_options, check_network, fit_posterior
from laplace_ws.posterior.groups import PriorStructure
from laplace_ws.posterior.memory_needs import default_memory_budget
from laplace_ws.posterior.network import Network
from laplace_ws.posterior.packing import stored_dtype
from laplace_ws.posterior.precision import PosteriorPrecision
from laplace_ws.posterior.predict import PredictionOptions, Predictor, PredType
from laplace_ws.posterior.predictive import Predictive
from laplace_ws.posterior.prior import Prior
from laplace_ws.posterior.structure import Problem, Structure, make_structure
from laplace_ws.posterior.subset import WeightSubset, make_subset
from laplace_ws.posterior.tune import Method, TuningOptions, tuned_covariance_scale, tuned_prior
from laplace_ws.values import flag, generator_or_none, given, path_of, real_number, shown, whole_number


class Laplace(Predictive, WeightDensity):
    """Laplace approximation over the weights of a network: all that require grad, or some of them.

    With L the summed negative log likelihood, H its curvature (sum over the data), Δ the diagonal prior precision and τ the temperature,
    the posterior is N(θ*, (H/τ + Δ)⁻¹), and the log marginal likelihood [Immer et al. 2021]

        log p(D) ≈ −L(θ*)/τ − ½ (θ*−μ)ᵀΔ(θ*−μ) − ½ [log det(H/τ + Δ) − log det Δ].

    It is made of parts: a `Network` (model and covered weights), a `Structure` of the curvature, a `Fit` to data and a `Prior`; evidence,
    tuning, prediction and files are functions of these.

    Args:
        model: a trained network; its first input axis and first output axis run over examples.
        likelihood: "classification" (softmax), "regression" (Gaussian), "heteroscedastic_regression", "binary" (Bernoulli, multi-label),
            "reward_modeling" (Bradley-Terry), or a `Likelihood`.
        subset_of_weights: "all", "last_layer", "subnetwork", patterns of names of parameters or modules, as in `["head", "*.bias"]`, or a
            `WeightSubset`. Parameters that do not require grad are always left out.
        hessian_structure: "kron", "ekfac", "diag", "full", "lowrank", or a registered one; see `posterior.structures`.
        last_layer_name: the module that is the last layer; by default the last one that holds parameters, which a fit checks.
        subnetwork_indices: for "subnetwork", indices into the flat vector of all weights that require grad, see `posterior.subnetwork`;
            for "diag" and "full".
        prior_precision: Δ: a number, one per parameter tensor (`[len(parameter_names)]`), or one per weight (`[n_params]`; not with "kron"
            and "ekfac").
        prior_mean: μ: a number, or one per weight.
        sigma_noise: standard deviation σ of the observation noise (regression); default: the likelihood's own.
        temperature: τ; the likelihood enters to the power 1/τ. A tempered class likelihood is not normalised, so values of the log marginal
            likelihood compare only at equal τ.
        curvature: "ggn", "ggn_mc" (sampled labels), "ggn_mc_rademacher" (random signs) or "ef" (empirical Fisher).
        backend: "native", "asdl", "backpack", or a `Backend`: what runs the model; the results are the same. "autograd" covers whatever can
            be differentiated, slowly and without Kronecker factors.
        mc_samples: random columns per example, for "ggn_mc" and "ggn_mc_rademacher".
        generator: source of the labels or signs; by default an internal one, which `torch.manual_seed` makes reproducible.
        dict_key_x: for batches that are mappings, the entry that gives the number of examples and the device.
        dict_key_y: for batches that are mappings, the entry with the targets.
        memory_budget: bytes that the Jacobians of a prediction may take at a time, which decides how many examples are processed at once.
            Where not given, 256 MiB, or eight times the covered parameters where that is more.
        class_names: names of the classes or outputs, kept in files.
        **structure_options: of the structure: `kfac_approx` ("auto", "expand", "reduce" or a mapping from patterns of parameter names to
            these; "auto" is expand, but reduce for parameters in the reduce setting, see `KfacApprox`), `factor_precision` ("float32",
            "tf32" or "bf16") and `max_factor_dim` (of a factor with more rows only the diagonal is kept; default: no limit) of "kron" and
            "ekfac"; `rank` of "lowrank".

    Attributes:
        network: the model, the covered weights, and the backend.
        structure: of the curvature, with its options.
        prior: hyperparameters.
        mc_samples, generator: of the next fit.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        subset_of_weights: str | Sequence[str] | WeightSubset = "all",
        hessian_structure: str = "kron",
        *,
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
        memory_budget: int | None = None,
        class_names: Sequence[str] | None = None,
        **structure_options: Any,
    ):
        own_options = inspect.signature(type(self).__init__).parameters
        structure = make_structure(hessian_structure, structure_options, other_options=own_options)
        self.mc_samples: int = whole_number("mc_samples", mc_samples, least=1)
        generator = generator_or_none("generator", generator)
        if isinstance(subset_of_weights, WeightSubset):
            if last_layer_name is not None or subnetwork_indices is not None:
                raise ValueError("a WeightSubset says all; leave out last_layer_name and subnetwork_indices.")
            subset = subset_of_weights
        else:
            subset = make_subset(
                model, subset_of_weights, last_layer_name=last_layer_name, subnetwork_indices=subnetwork_indices
            )
        if subset.selection and not structure.covers_single_weights:
            raise ValueError(
                f'hessian_structure={structure.name!r} covers parameters whole; a subnetwork needs "diag" or "full".'
            )
        is_guess = subset_of_weights == "last_layer" and last_layer_name is None
        among: frozenset[str] = frozenset(trainable_parameters(model) if is_guess else ())
        self.network: Network = Network(model, subset, make_backend(backend), BatchKeys(dict_key_x, dict_key_y), among)
        self.structure: Structure = structure.bound(self.parameter_names)
        check_visible(model, self.network.parameters().values())
        if memory_budget is None:
            memory_budget = default_memory_budget(self.network.parameters().values())
        self.memory_budget: int = whole_number("memory_budget", memory_budget, least=1)
        self._likelihood: Likelihood = make_likelihood(likelihood)
        self.curvature = curvature
        weights = self.network.flat_weights()
        self.generator: torch.Generator = generator or default_generator(weights.device)
        self.class_names = None if class_names is None else _checked_names(class_names)
        self.prior: Prior = Prior.of(
            self.shapes,
            self._likelihood,
            self.structure,
            weights.device,
            precision=given("prior_precision", prior_precision),
            mean=given("prior_mean", prior_mean),
            sigma_noise=sigma_noise,
            temperature=given("temperature", temperature),
        )
        self._mean = weights
        self._fit: Fit | None = None
        self.covariance_scale = 1.0

    @classmethod
    def from_optimizer(
        cls,
        optimizer: CurvatureAverages,
        likelihood: str | Likelihood,
        subset_of_weights: str | Sequence[str] | WeightSubset = "all",
        *,
        n_data: int,
        nll_sum: float | None = None,
        train_loader: Data | None = None,
        loss_scale: float = 1.0,
        **options: Any,
    ) -> Laplace:
        """A posterior with the Kronecker factors that `optim.KFAC` has averaged while it trained, at the weights as they are now.

        It costs no pass over the data. In place of a fit's sum over the data at one set of weights, its curvature is N times a mean over
        the batches of the last 1/(1 − factor_decay) steps that counted, each at the weights of that step, and of the network as it was
        trained: with dropout, and with statistics over the batch.

        Args:
            optimizer: a `KFAC` that has taken steps.
            likelihood: whose negative log likelihood, at σ = 1, it was trained by.
            subset_of_weights: see `Laplace`; all of these weights must have Kronecker factors, which those of normalisations do not.
            n_data: N, the number of training examples.
            nll_sum: their negative log likelihood in nats at these weights, at σ = 1.
            train_loader: the training data, from which one forward pass computes it instead.
            loss_scale: with `curvature="ef"`, the loss of one example over its negative log likelihood at σ = 1: 2/C where the loss is
                `mse_loss` of C outputs.
            **options: others of `Laplace`, but for those of the curvature, which are the optimiser's.

        Raises:
            TypeError: the optimizer averages no curvature.
            UnsupportedParameterError: a weight has no Kronecker factors.
            ValueError: there is no source of the negative log likelihood, or two.
        """
        n_data = check_source(n_data, nll_sum, train_loader)
        averages = check_averages(optimizer)
        la = cls(averages.model, likelihood, subset_of_weights, "kron", curvature=averages.curvature.value, **options)
        kron = covered_blocks(averages, la.network, n_data)
        la.structure = structure = structure_of(kron)
        la._fit = fit_of_averages(
            averages,
            kron,
            structure,
            la._problem,
            n_data=n_data,
            nll_sum=nll_sum,
            train_loader=train_loader,
            loss_scale=loss_scale,
        )
        return la

    # ---------------------------------------------------------------- parts

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.network.model

    @property
    def subset(self) -> WeightSubset:
        """The weights that are covered."""
        return self.network.subset

    @property
    def backend(self) -> Backend:
        """The backend, which runs the model."""
        return self.network.backend

    @property
    def keys(self) -> BatchKeys:
        """Names of the entries of batches that are mappings."""
        return self.network.keys

    @property
    def curvature(self) -> Curvature:
        """Which curvature the next fit takes."""
        return self._curvature

    @curvature.setter
    def curvature(self, curvature: str) -> None:
        self._curvature: Curvature = Curvature(curvature)

    @property
    def likelihood(self) -> Likelihood:
        """p(y | f), of the next fit."""
        return self._likelihood

    @likelihood.setter
    def likelihood(self, likelihood: str | Likelihood) -> None:
        self._likelihood = likelihood = make_likelihood(likelihood)
        self.prior = replace(self.prior, likelihood=likelihood)

    @property
    def hessian_structure(self) -> str:
        """Name of the structure."""
        return self.structure.name

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The parameters covered, in the order of every flat vector."""
        return tuple(self.network.shapes)

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Shape of the covered part of each parameter."""
        return self.network.shapes

    @property
    def n_params(self) -> int:
        """P, the number of covered weights."""
        return self.network.n_params

    @property
    def options(self) -> dict[str, Any]:
        """Options that fits must share to be added up, and that a saved posterior must share to be loaded, as plain values."""
        return all_options(self.structure, self._problem)

    @property
    def fitted(self) -> Fit:
        """What the last fit found.

        Raises:
            NotFittedError: there is none.
        """
        if self._fit is None:
            raise NotFittedError(f"{type(self).__name__} is not fitted yet; call fit(train_loader) first.")
        return self._fit

    @fitted.setter
    def fitted(self, fit: Fit) -> None:
        self._fit = fit
        self.network.forget()

    @property
    def H(self) -> CurvatureMatrix:
        """Curvature of the summed negative log likelihood at σ = 1 and τ = 1."""
        return self.fitted.H

    @property
    def mean(self) -> Float[Tensor, " P"]:
        """θ*, flat; before a fit, the weights that the model had when the posterior was created."""
        return self._mean if self._fit is None else self._fit.mean

    @property
    def n_data(self) -> int:
        """N, the number of examples that the fit stands for; 0 before a fit."""
        return 0 if self._fit is None else self._fit.totals.n_examples

    @property
    def n_outputs(self) -> int | None:
        """Outputs of the network for one example (and term); None before a fit."""
        if self._fit is None:
            return None
        return self._fit.output_shape[-1] if self._fit.output_shape else 1

    # ---------------------------------------------------------------- hyperparameters

    @property
    def prior_precision(self) -> Tensor:
        """Δ, float64: a scalar, one per parameter tensor, or one per weight."""
        return self.prior.precision

    @prior_precision.setter
    def prior_precision(self, value: float | Tensor) -> None:
        self.prior = self.prior.changed(precision=given("prior_precision", value))

    @property
    def prior_precision_diag(self) -> Float[Tensor, " P"]:
        """Δ of every weight."""
        return self.prior.precision_per_weight()

    @property
    def prior_mean(self) -> Tensor:
        """μ, a scalar or one per weight."""
        return self.prior.mean

    @prior_mean.setter
    def prior_mean(self, value: float | Tensor) -> None:
        self.prior = self.prior.changed(mean=given("prior_mean", value))

    @property
    def sigma_noise(self) -> Tensor:
        """σ, in the units of the targets."""
        return self.prior.sigma_noise

    @sigma_noise.setter
    def sigma_noise(self, value: float | Tensor) -> None:
        self.prior = self.prior.changed(sigma_noise=given("sigma_noise", value))

    @property
    def temperature(self) -> Tensor:
        """τ."""
        return self.prior.temperature

    @temperature.setter
    def temperature(self, value: float | Tensor) -> None:
        self.prior = self.prior.changed(temperature=given("temperature", value))

    @property
    def covariance_scale(self) -> float:
        """κ, which multiplies the posterior covariance in samples and predictions; 1 unless it is set. The evidence is without it."""
        return self._covariance_scale

    @covariance_scale.setter
    def covariance_scale(self, value: float) -> None:
        self._covariance_scale: float = real_number("covariance_scale", value, above=0)

    # ---------------------------------------------------------------- fit

    def fit(
        self,
        train_loader: Data,
        *,
        n_data: int | None = None,
        override: bool = True,
        progress_bar: bool = False,
        recheck: bool = True,
        averaged_with: tuple[CurvatureMatrix, float] | None = None,
    ) -> Laplace:
        """Compute the curvature at the current weights, in one pass over the data ("ekfac": two, "lowrank": many).

        Args:
            train_loader: iterable of batches: pairs (x, y), rows (x1, x2, …, y) for `model(x1, x2, …)`, or mappings.
            n_data: N, where the data are a sample of a larger set of N examples: likelihood and curvature are scaled up to it.
            override: whether the fit replaces the previous one; otherwise the data are added to those of that fit, at the same weights.
            progress_bar: show one, if stderr is a terminal.
            recheck: whether to check the backend's gradients against autograd even if the network, as far as its modules show, is the one
                that was checked before. A training that refits one network again and again may leave it out.
            averaged_with: a curvature at earlier weights, scaled to N like this one, and its weight in the mean with that at the current
                weights: for tuning while training, where each fit sees few of the data. For structures that read the data once.

        Returns:
            The posterior itself, so that `la = Laplace(…).fit(train_loader)`.

        Raises:
            UnsupportedParameterError: a parameter that should be covered cannot be.
            InvalidBatchError: the data do not fit the model or the likelihood, or are empty.
            ValueError: data cannot be added, as weights or options differ from those of the previous fit.
        """
        before = None if flag("override", override) else self._fit
        self._fit = fit_posterior(
            self.structure,
            self._problem,
            train_loader,
            before=before,
            n_data=n_data,
            progress_bar=flag("progress_bar", progress_bar),
            recheck=flag("recheck", recheck),
            averaged_with=averaged_with,
        )
        return self

    def decompose(self, *, progress_bar: bool = False) -> Laplace:
        """Compute the eigenvectors of Kronecker factors now, and their eigenvalues with them; nothing for other structures.

        Without this the evidence computes the eigenvalues when it is first asked for, and the first prediction the eigenvectors, which
        takes the eigenvalues once more. Worth a call after the fit of a wide network that is both tuned and used for predictions; of
        several processes, which divide the factors among them, each calls it.

        Args:
            progress_bar: show one, if stderr is a terminal.

        Returns:
            The posterior itself.

        Raises:
            NotFittedError: there is no fit.
        """
        self.structure.decompose(self.fitted.H, processes(), progress_bar=flag("progress_bar", progress_bar))
        return self

    def check(self, x: Any) -> None:
        """Run the model on one batch and raise what a fit would raise, before any work is done.

        Raises:
            UnsupportedParameterError: a parameter that should be covered cannot be; the message names it and says how to resolve this.
            InvalidBatchError: the batch is on another device, or the outputs do not fit.
        """
        self.structure.check(self._problem, self.network.inputs(x))

    def check_weights(self) -> None:
        """Raise `ValueError` unless the model is that of the fit: the covered weights to the rounding of float32, all else by sums."""
        check_network(self.network, self.fitted)

    def load_mean(self) -> None:
        """Write the mean of the posterior into the model's weights."""
        self.network.load(self.mean)

    @property
    def _problem(self) -> Problem:
        return Problem(self.network, self.likelihood, self.curvature, self.mc_samples, self.generator)

    # ---------------------------------------------------------------- evidence

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
        prior = self.prior.changed(precision=prior_precision, sigma_noise=sigma_noise, temperature=temperature)
        return log_marginal_likelihood(self.fitted, prior)

    @property
    def log_likelihood(self) -> Float[Tensor, ""]:
        """log p(D | θ*) at the current σ, in nats, untempered."""
        return -self.fitted.nll_sum(self.sigma_noise)

    @property
    def posterior_precision(self) -> Any:
        """(H/τ + Δ)/κ, in the form of the structure."""
        return self.structure.posterior_precision(PosteriorPrecision(self.H, *self.predictor.damping))

    def optimal_prior_precision(self, prior_structure: str = "layerwise") -> Tensor:
        """Δ at which the log marginal likelihood of the current fit is highest, at the current σ and τ; `prior_precision` is unchanged.

        A group whose weights are all at the prior mean has its optimum at an infinite δ, and one without curvature at zero: they get the
        upper and the lower limit in `evidence.BOUNDS`.

        Args:
            prior_structure: which weights share one: "scalar", "layerwise", "parameter" or "weight", see `prior_groups`.
        """
        return optimal_prior_and_noise(self.fitted, self.prior, prior_structure, fix_noise=True)[0]

    def optimal_prior_and_noise(self, prior_structure: str = "layerwise") -> tuple[Tensor, Float[Tensor, ""]]:
        """Δ and σ at which the log marginal likelihood is highest together; otherwise as `optimal_prior_precision`."""
        fix_noise = not self.likelihood.has_noise
        return optimal_prior_and_noise(self.fitted, self.prior, prior_structure, fix_noise=fix_noise)

    def optimize_prior_precision(
        self,
        method: str = "marglik",
        *,
        prior_structure: str = "scalar",
        val_loader: Data | None = None,
        loss: str | Callable[[Any, Tensor], Any] = "nll",
        pred_type: str = "glm",
        link_approx: str = "probit",
        n_samples: int = 100,
        log_prior_prec_min: float = -4.0,
        log_prior_prec_max: float = 4.0,
        grid_size: int = 25,
        optimizer: str = "newton",
        n_steps: int = 100,
        lr: float = 0.1,
        optimize_noise: bool = False,
        optimize_temperature: bool = False,
        generator: torch.Generator | None = None,
        progress_bar: bool = False,
    ) -> Tensor:
        """Choose and set the prior precision, and on request noise and temperature too.

        Args:
            method: "marglik": the optimum of the log marginal likelihood, with no pass over the data. "gridsearch": the
                best scalar of a grid on validation data, the whole grid in one pass over them. "gradient": the optimum of the mean
                negative log predictive density of validation data, by L-BFGS from the current values; each step is one pass over the data.
            prior_structure: which weights share one: "scalar", "layerwise", "parameter" or "weight" (not with "kron" and "ekfac").
            val_loader: validation data that the network was not trained on, in batches like those of the fit.
            loss: of "gridsearch": "nll", "ece", "brier", a torchmetrics metric (negated where higher is better), or a function of
                predictions and targets.
            pred_type: of predictions on validation data, see `__call__`.
            link_approx: likewise.
            n_samples: likewise; each point of a grid sees the same draws.
            log_prior_prec_min: log₁₀ of the smallest point of the grid.
            log_prior_prec_max: log₁₀ of its largest.
            grid_size: number of its points, evenly spaced in the logarithm.
            optimizer: of "marglik": "newton", which goes to the optimum, or "adam", which takes steps towards it from the current values.
            n_steps: number of steps of "adam", and largest number of "gradient".
            lr: step size of "adam", on logarithms.
            optimize_noise: choose σ too (regression; not by "gridsearch").
            optimize_temperature: choose τ too, by "gradient".
            generator: source of randomness of sampled predictions.
            progress_bar: show one, if stderr is a terminal.

        Returns:
            The prior precision.
        """
        options = TuningOptions(
            Method(method),
            PriorStructure(prior_structure),
            loss,
            log_prior_prec_min,
            log_prior_prec_max,
            grid_size,
            optimizer,
            n_steps,
            lr,
            optimize_noise,
            optimize_temperature,
        )
        prediction = PredictionOptions(PredType(pred_type), LinkApprox(link_approx), n_samples, generator)
        title = "prior precision" if progress_bar and options.method is Method.GRIDSEARCH else None
        batches = None if val_loader is None else Batches.of(val_loader, self.model, self.keys, progress=title)
        self.prior = tuned_prior(self.predictor, options, batches, prediction)
        return self.prior_precision

    def optimize_covariance_scale(
        self,
        val_loader: Data,
        loss: str | Callable[[Any, Tensor], Any] = "nll",
        *,
        link_approx: str = "probit",
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        progress_bar: bool = False,
    ) -> float:
        """Choose and set `covariance_scale` by predictions of the linearised network on validation data, in one pass over them.

        It mends a posterior that is too unsure, or too sure, without a change of the ratios between prior precisions.

        Args:
            val_loader: validation data that the network was not trained on, in batches like those of the fit.
            loss: as for "gridsearch" in `optimize_prior_precision`.
            link_approx: of these predictions, see `__call__`.
            n_samples: likewise; each multiplier sees the same draws.
            generator: source of randomness of sampled predictions.
            progress_bar: show one, if stderr is a terminal.

        Returns:
            The scale.
        """
        prediction = PredictionOptions(PredType.GLM, LinkApprox(link_approx), n_samples, generator)
        title = "covariance scale" if flag("progress_bar", progress_bar) else None
        batches = Batches.of(val_loader, self.model, self.keys, progress=title)
        self.covariance_scale = tuned_covariance_scale(self.predictor, loss, batches, prediction)
        return self.covariance_scale

    @property
    def predictor(self) -> Predictor:
        """The current posterior, as far as predictions need it; raises `NotFittedError` before a fit."""
        return Predictor(self.network, self.fitted, self.prior, self.memory_budget, self.covariance_scale)

    # ---------------------------------------------------------------- files

    def state_dict(self, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Tensors and plain values that restore the posterior for a model with the same parameters; see `files.posterior_state`.

        Args:
            dtype: of the curvature, see `save`.
        """
        return files.posterior_state(
            self.fitted,
            self.prior,
            self.network,
            memory_budget=self.memory_budget,
            covariance_scale=self.covariance_scale,
            class_names=self.class_names,
            dtype=stored_dtype(dtype),
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a fit; the model's weights are left alone, see `load_mean`.

        Raises:
            FileFormatError: `state` is not a posterior, or one in another format.
            ValueError: it has other options, or belongs to a model with other parameters.
        """
        found = files.restored(state, self.structure, self._problem, self.prior)
        self._fit, self.prior, self.covariance_scale = found.fit, found.prior, found.covariance_scale
        self.network.forget()
        if self.class_names is None:
            self.class_names = found.class_names

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write `state_dict()` to a file, which `load_posterior` and `torch.load(path, weights_only=True)` read.

        Args:
            path: of the file.
            dtype: how large tensors of the curvature are stored: `torch.float16` or `torch.bfloat16` for a quarter of the size,
                `torch.float32` for half of it, as of symmetric factors one triangle is kept; None for the tensors as they are. Everything
                else, and what is loaded, keeps its precision.
        """
        save_tensors(path_of("path", path), self.state_dict(dtype))

    def __repr__(self) -> str:
        fitted = "not fitted" if self._fit is None else f"fitted to {self.n_data} examples"
        covered = f"{len(self.shapes)} parameters, {self.n_params} weights"
        return f"Laplace({self.hessian_structure}, {self.likelihood.name}, {covered}, {fitted})"


def _checked_names(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):  # pyright: ignore
        raise TypeError(f"class_names must be a list of strings, one per class, got {shown(names)}.")
    return tuple(names)
