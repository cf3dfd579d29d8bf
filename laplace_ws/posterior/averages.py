"""A posterior from the curvature that an optimiser has averaged over its steps, without a pass of its own over the data."""

from __future__ import annotations

import math
from typing import Protocol, TypeGuard

import torch
from torch import nn

from laplace_ws.curvature import Curvature
from laplace_ws.curvature.backend import evaluation_mode
from laplace_ws.curvature.batches import Batches, Data
from laplace_ws.curvature.finite import check_finite_curvature
from laplace_ws.curvature.inputs import ModelInputs, call_model, own_copy
from laplace_ws.curvature.totals import DataTotals
from laplace_ws.errors import NotFittedError, UnsupportedParameterError
from laplace_ws.matrices import Kron
from laplace_ws.posterior.fingerprint import Fingerprint
from laplace_ws.posterior.fit import Fit, all_options
from laplace_ws.posterior.function import FunctionFingerprint
from laplace_ws.posterior.network import Network
from laplace_ws.posterior.structure import Problem, Structure, make_structure
from laplace_ws.values import real_number, shown, whole_number


class CurvatureAverages(Protocol):
    """An optimiser that averages Kronecker factors, such as `optim.KFAC`."""

    model: nn.Module

    @property
    def curvature(self) -> Curvature:
        """Which curvature they are of."""
        ...

    @property
    def n_arguments(self) -> int:
        """With how many arguments the model was called."""
        ...

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of the model's output for one example."""
        ...

    def kron(self, n_data: int) -> Kron:
        """The curvature of the negative log likelihood summed over N examples, of every parameter that has a block."""
        ...


def averages_curvature(optimizer: object) -> TypeGuard[CurvatureAverages]:
    """Whether an optimiser averages Kronecker factors."""
    return all(hasattr(type(optimizer), name) for name in ("kron", "curvature", "n_arguments", "output_shape"))


def averages_of(optimizer: object) -> CurvatureAverages | None:
    """An optimiser that averages Kronecker factors; None for any other."""
    return optimizer if averages_curvature(optimizer) else None


def check_averages(optimizer: object) -> CurvatureAverages:
    """Raise `TypeError` unless an optimiser averages Kronecker factors."""
    if not averages_curvature(optimizer):
        raise TypeError(
            f"a posterior needs an optimizer that averages curvature, such as laplace_ws.optim.KFAC, got {shown(optimizer)}; "
            "for others, Laplace(…).fit(train_loader)."
        )
    return optimizer


def covered_blocks(averages: CurvatureAverages, network: Network, n_data: int) -> Kron:
    """The blocks of the weights that a posterior covers.

    Raises:
        NotFittedError: no weight has one yet.
        UnsupportedParameterError: one of them has none.
    """
    found = averages.kron(n_data)
    if not found:
        raise NotFittedError("the optimizer has averaged no curvature yet; take a step first.")
    missing = [name for name in network.shapes if name not in found]
    if missing:
        raise UnsupportedParameterError(
            f"{', '.join(map(repr, missing))} {'has' if len(missing) == 1 else 'have'} no Kronecker factors in the optimizer, which gave "
            "first-order steps there; leave them out, subset_of_weights=[…], or fit the posterior to data."
        )
    return Kron({name: found[name] for name in network.shapes})


def structure_of(kron: Kron) -> Structure:
    """The structure of a posterior with these blocks."""
    approximations = {name: block.approx or "expand" for name, block in kron.items()}
    return make_structure("kron", {"kfac_approx": approximations}).bound(list(kron))


def fit_of_averages(
    averages: CurvatureAverages,
    kron: Kron,
    structure: Structure,
    problem: Problem,
    *,
    n_data: int,
    nll_sum: float | None,
    train_loader: Data | None,
    loss_scale: float,
) -> Fit:
    """What a fit to N examples would have learned, by the averages.

    Args:
        averages: the optimiser.
        kron: its blocks, of N examples.
        structure: of the posterior.
        problem: whose curvature it is.
        n_data: N.
        nll_sum: their negative log likelihood at the model's weights and σ = 1, in nats.
        train_loader: or data from which to compute it, scaled up to N examples.
        loss_scale: what the loss of one example that was differentiated is, over its negative log likelihood at σ = 1.
    """
    check_finite_curvature(kron)
    network, likelihood = problem.network, problem.unit_likelihood
    function: FunctionFingerprint | None = None
    if train_loader is not None:
        totals, first = _totals(problem, train_loader)
        totals = totals.scaled_to(n_data)
        function = FunctionFingerprint.of(network.model, first)
    else:
        shape = averages.output_shape
        of_terms = shape if likelihood.target_ndim else shape[:-1]
        totals = DataTotals(real_number("nll_sum", nll_sum), n_data, n_data * math.prod(of_terms), output_shape=shape)
    scale = real_number("loss_scale", loss_scale, above=0)
    network.forget()
    return Fit(
        H=kron * (1 / scale**2) if problem.curvature is Curvature.EF and scale != 1 else kron,
        totals=totals,
        mean=network.flat_weights(),
        likelihood=likelihood,
        curvature=problem.curvature,
        options=all_options(structure, problem),
        n_arguments=averages.n_arguments,
        fingerprint=Fingerprint.of(network.model, network.subset),
        function=function,
    )


def check_source(n_data: int, nll_sum: float | None, train_loader: Data | None) -> int:
    """N; raises `ValueError` unless the negative log likelihood has one source."""
    if (nll_sum is None) == (train_loader is None):
        raise ValueError(
            "the negative log likelihood is not among what an optimizer averages: give nll_sum, of all N examples in nats (N times the "
            "mean loss of the last epoch is near it), or train_loader, for one forward pass over the data, and not both."
        )
    return whole_number("n_data", n_data, least=1)


def _totals(problem: Problem, data: Data) -> tuple[DataTotals, ModelInputs]:
    """The sums of one forward pass over the data, and the first inputs."""
    network, likelihood = problem.network, problem.unit_likelihood
    totals, first = DataTotals(), None
    with evaluation_mode(network.model), torch.no_grad():
        for x, y in Batches.of(data, network.model, network.keys):
            first = x if first is None else first
            f = call_model(network.model, own_copy(x))
            likelihood.check(f, y)
            totals.add(likelihood, f, y)
    totals.check_not_empty(likelihood)
    assert first is not None
    return totals, first
