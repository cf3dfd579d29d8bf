"""What a posterior has learned from data, and how it learns it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.curvature import Curvature
from laplace_ws.curvature.anatomy import Anatomy
from laplace_ws.curvature.batches import Batches, Data
from laplace_ws.curvature.inputs import ModelInputs, StructuredInputs
from laplace_ws.curvature.processes import check_alike
from laplace_ws.curvature.totals import DataTotals
from laplace_ws.curvature.watch import DataWatch, draws_with_replacement, warn_of_final_operation
from laplace_ws.errors import InvalidBatchError
from laplace_ws.likelihoods import Likelihood
from laplace_ws.matrices import CurvatureMatrix, Damping
from laplace_ws.posterior.fingerprint import Fingerprint, StateVersion, check_covered_weights
from laplace_ws.posterior.function import FunctionFingerprint
from laplace_ws.posterior.network import Network
from laplace_ws.posterior.prior import Prior
from laplace_ws.posterior.structure import Problem, Structure
from laplace_ws.threads import alone_with
from laplace_ws.values import whole_number


@dataclass(frozen=True)
class Fit:
    """Curvature and sums over the data at the mode, and the settings under which they were computed.

    Attributes:
        H: curvature of the summed negative log likelihood at σ = 1 and τ = 1.
        totals: negative log likelihood at σ = 1 and counts of the data.
        mean: θ*, flat.
        likelihood: p(y | f) at σ = 1.
        curvature: which curvature of its negative log likelihood H is.
        options: all options that it was made with, as plain values; fits that are added up must share them.
        n_arguments: number of arguments with which the model was called.
        fingerprint: of what is not covered.
        function: what the model gave on a batch that is made up; None where none like the data can be made.
        examples: hashes of examples of the data, as far as they were looked at; none in a fit from a file.
    """

    H: CurvatureMatrix
    totals: DataTotals
    mean: Float[Tensor, " P"]
    likelihood: Likelihood
    curvature: Curvature
    options: Mapping[str, Any]
    n_arguments: int
    fingerprint: Fingerprint
    function: FunctionFingerprint | None = None
    examples: frozenset[int] = frozenset()

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the model's output for one example."""
        return self.totals.output_shape

    def nll_sum(self, sigma_noise: Tensor) -> Float[Tensor, ""]:
        """−log p(D | θ*) in nats at a given noise, differentiable in it."""
        unit = torch.tensor(self.totals.nll_sum, dtype=torch.float64, device=self.mean.device)
        return self.likelihood.nll_at_noise(unit, self.totals.n_targets, sigma_noise)

    def scale(self, sigma_noise: Tensor, temperature: Tensor) -> Float[Tensor, ""]:
        """s such that s·H is the curvature of the tempered negative log likelihood at a noise."""
        return self.likelihood.curvature_scale(sigma_noise, self.curvature.value) / temperature

    def damping(self, prior: Prior) -> Damping:
        """Scale s and Δ such that the posterior precision is s·H + Δ."""
        return self.scale(prior.sigma_noise, prior.temperature), prior.precision


def all_options(structure: Structure, problem: Problem) -> dict[str, Any]:
    """What fits must share to be added up, and a saved posterior to be loaded, as plain values."""
    return {"hessian_structure": structure.name, **problem.options(), **structure.options()}


def fit_posterior(
    structure: Structure,
    problem: Problem,
    data: Data,
    *,
    before: Fit | None = None,
    n_data: int | None = None,
    progress_bar: bool = False,
    recheck: bool = True,
    averaged_with: tuple[CurvatureMatrix, float] | None = None,
) -> Fit:
    """Compute the curvature at the current weights.

    Args:
        structure: of the curvature.
        problem: whose curvature.
        data: batches.
        before: a fit to which the data are added; None for a fit to these data alone.
        n_data: number of examples N that the data stand for; default: the number of examples seen.
        progress_bar: show one, if stderr is a terminal.
        recheck: whether to check the backend against autograd anew, whatever is known of the network, and that all processes have the same.
        averaged_with: a curvature at earlier weights, and its weight in the mean with that of this fit.

    Raises:
        InvalidBatchError: the data do not fit.
        UnsupportedParameterError: a parameter cannot be covered.
        ValueError: data cannot be added to the previous fit, as weights, options or outputs differ, or another process has others.
    """
    n_data = None if n_data is None else whole_number("n_data", n_data, least=1)
    network, options = problem.network, all_options(structure, problem)
    batches = Batches.of(data, network.model, network.keys, progress="Laplace fit" if progress_bar else None)
    if structure.reads_data_again and batches.is_one_pass:
        raise InvalidBatchError(
            f"hessian_structure={structure.name!r} reads the data more than once, but a {type(batches.loader).__name__} is used up after "
            "the first pass; give a DataLoader or a list of batches."
        )
    if recheck:
        n_examples = {"n_data": n_data, "number of examples in the data set": batches.n_in_data_set}
        check_alike(batches.processes, network.model, {**options, **n_examples})
    if before is not None:
        _check_same_options(options, before.options)
        check_network(network, before)
    if recheck:
        with alone_with(network.model):  # another thread may be using what is known
            network.check.forget()
    n_arguments = 1
    first: ModelInputs | None = None
    watch = DataWatch(problem.likelihood) if recheck else None

    def look_at_first(x: ModelInputs) -> None:
        nonlocal n_arguments, first
        first = x
        if watch is not None:
            watch.begin()
        n_arguments = len(x.arguments) if isinstance(x, StructuredInputs) else 1
        network.check_last_layer(x)

    batches = replace(batches, on_first=look_at_first, on_each=watch)
    found, totals = structure.curvature(problem, batches, None if before is None else before.H)
    if n_data is not None and n_data != totals.n_examples:
        found, totals = found * (n_data / totals.n_examples), totals.scaled_to(n_data)
    if averaged_with is not None:
        earlier, weight = averaged_with
        found = earlier * weight + found * (1 - weight)
    if before is not None:
        _check_same_form(before.output_shape, totals.output_shape)
        found, totals = before.H + found, before.totals + totals
    structure.prepare(found, batches.processes)
    network.forget()
    if watch is not None and first is not None:
        watch.warn(repeats=not draws_with_replacement(batches.loader), stacklevel=3)
        warn_of_final_operation(network.model, problem.likelihood, network.final_operation(first), stacklevel=3)
    examples: frozenset[int] = frozenset() if watch is None else watch.examples()
    examples = examples.union(*batches.processes.gather(examples))
    if before is not None:
        examples |= before.examples
    return Fit(
        H=found,
        totals=totals,
        mean=network.flat_weights(),
        likelihood=problem.unit_likelihood,
        curvature=problem.curvature,
        options=options,
        n_arguments=n_arguments,
        fingerprint=Fingerprint.of(network.model, network.subset),
        function=None if first is None else FunctionFingerprint.of(network.model, first),
        examples=examples,
    )


def check_network(network: Network, fit: Fit) -> None:
    """Raise `ValueError` unless the model is that of a fit: the covered weights to the rounding of float32, all else by its fingerprint,
    and what it computes by its outputs on a fixed batch.

    What is not covered, which may be a large frozen base, is read in full, and the model is run, only where something may have been
    written since the last check, or modules or their settings are others.
    """
    check_covered_weights(network.flat_weights(), fit.mean, network.shapes)
    version = StateVersion.of(network.model, network.subset)
    anatomy = Anatomy.of(network.model, network.parameters())
    if network.verified is not None:
        known, known_version, known_anatomy = network.verified
        if known is fit and anatomy.facts == known_anatomy.facts and version.equals(known_version):
            return
    fit.fingerprint.check(network.model, network.subset)
    if fit.function is not None:
        fit.function.check(network.model)
    network.verified = fit, version, anatomy


def _check_same_options(options: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    for option, value in options.items():
        if before.get(option) != value:
            raise ValueError(
                f"{option} was {before.get(option)!r} in the fit before and is {value!r}, and the two do not add up; set it back, or fit "
                "anew (override=True)."
            )


def _check_same_form(before: tuple[int, ...], now: tuple[int, ...]) -> None:
    """Outputs must have the same number of dimensions, with the last of the same size; sequences and images may be of any size."""
    if len(before) != len(now) or before[-1:] != now[-1:]:
        raise ValueError(
            f"the data give outputs {list(now)} per example, those of the fit before {list(before)}; fit anew (override=True)."
        )
