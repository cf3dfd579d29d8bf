"""What a posterior knows of the structure of its curvature: one record for each, and the registry of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from laplace_ws.curvature import Curvature, CurvatureSum
from laplace_ws.curvature.backend import evaluation_mode
from laplace_ws.curvature.batches import Batches
from laplace_ws.curvature.forward import probe
from laplace_ws.curvature.inputs import ModelInputs
from laplace_ws.curvature.totals import DataTotals
from laplace_ws.distributed import Processes
from laplace_ws.kfac import Accumulator
from laplace_ws.likelihoods import Likelihood
from laplace_ws.matrices import CurvatureMatrix
from laplace_ws.posterior.network import Network
from laplace_ws.posterior.precision import PosteriorPrecision
from laplace_ws.registry import Registry, nearest

MakeAccumulator = Callable[[Mapping[str, nn.Parameter]], Accumulator]
"""From the covered parameters by name, the sums of a pass over the data."""


class DataCurvature(NamedTuple):
    """What passes over the data give: the curvature at σ = 1, and all other sums."""

    H: CurvatureMatrix
    totals: DataTotals


@dataclass(frozen=True)
class Problem:
    """Which curvature is wanted, and of what.

    Attributes:
        network: the model and its covered weights.
        likelihood: p(y | f), at any σ.
        curvature: of the negative log likelihood.
        mc_samples: random columns per example.
        generator: their source.
    """

    network: Network
    likelihood: Likelihood
    curvature: Curvature
    mc_samples: int
    generator: torch.Generator

    @property
    def unit_likelihood(self) -> Likelihood:
        """p(y | f) at σ = 1."""
        return self.likelihood.at_noise(1.0)

    def options(self) -> dict[str, Any]:
        """The options as plain values."""
        return {
            "likelihood": self.unit_likelihood.state(),
            "curvature": self.curvature.value,
            "mc_samples": self.mc_samples,
        }

    def accumulate(self, batches: Batches, make_accumulator: MakeAccumulator) -> DataCurvature:
        """One pass over the data, with what a backend hands out."""
        total = CurvatureSum(
            self.network.model,
            self.unit_likelihood,
            make_accumulator,
            curvature=self.curvature,
            backend=self.network.backend,
            mc_samples=self.mc_samples,
            generator=self.generator,
            check=self.network.check,
            parameters=self.network.parameters(),
        )
        total.add_all(batches)
        return DataCurvature(total.result(), total.totals)

    def check(self, x: ModelInputs, make_accumulator: MakeAccumulator) -> None:
        """Raise what `accumulate` would raise about the model, using a few examples."""
        network = self.network
        parameters = network.parameters()
        with evaluation_mode(network.model, parameters):
            network.check.begin(parameters)
            uses = network.check.run(probe(x)).uses
            make_accumulator(parameters).start_batch(uses, network.check.in_reduce_setting)


class Structure(ABC):
    """One structure of the curvature, and everything specific to it. Subclasses are frozen dataclasses whose fields are its own options.

    Attributes:
        name: what `hessian_structure` calls it.
        matrix: the class of its curvature.
        prior_per_weight: whether each weight may have a prior precision of its own.
        covers_single_weights: whether it can cover only some weights of a parameter, as a subnetwork does.
        reads_data_again: whether a fit passes over the data more than once.
        needs_same_data: whether these passes must give the same data.
    """

    name: ClassVar[str]
    matrix: ClassVar[type[CurvatureMatrix]]
    prior_per_weight: ClassVar[bool] = True
    covers_single_weights: ClassVar[bool] = False
    reads_data_again: ClassVar[bool] = False
    needs_same_data: ClassVar[bool] = False

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """Names of its own options."""
        return tuple(f.name for f in fields(cls))  # type: ignore[arg-type]

    def bound(self, parameter_names: Sequence[str]) -> Structure:
        """This structure with its options resolved for the parameters of a model."""
        return self

    def options(self) -> dict[str, Any]:
        """Its options as plain values, from which it can be made anew."""
        return {name: getattr(self, name) for name in self.option_names()}

    def resolved(self, network: Network) -> dict[str, Any]:
        """Its options, with what they leave open decided as for a network that has been checked."""
        return self.options()

    @abstractmethod
    def curvature(self, problem: Problem, batches: Batches, before: CurvatureMatrix | None) -> DataCurvature:
        """The curvature, computed from data.

        Args:
            problem: which curvature, and of what.
            batches: the data.
            before: the curvature of other data that this one will be added to, if any.
        """

    def prepare(self, H: CurvatureMatrix, processes: Processes) -> None:  # noqa: B027 - most structures need nothing
        """Compute, together with the other processes of a fit, what the evidence will need."""

    def decompose(self, H: CurvatureMatrix, processes: Processes, *, progress_bar: bool = False) -> None:  # noqa: B027
        """Compute what predictions will need."""

    @abstractmethod
    def check(self, problem: Problem, x: ModelInputs) -> None:
        """Run the model on a few examples and raise what `curvature` would raise, before any work is done."""

    def posterior_precision(self, precision: PosteriorPrecision) -> Any:
        """H/τ + Δ in the form of the structure."""
        return precision


STRUCTURES: Registry[type[Structure]] = Registry("hessian_structure")


def register_structure(structure: type[Structure]) -> type[Structure]:
    """Make a structure of your own available as `hessian_structure=structure.name`; also a decorator of its class.

    Raises:
        TypeError: it is no subclass of `Structure`, or has no name.
        ValueError: another has its name.
    """
    if not isinstance(structure, type) or not issubclass(structure, Structure) or not hasattr(structure, "name"):  # pyright: ignore
        raise TypeError(f"register_structure takes a subclass of Structure with a name, got {structure!r}.")
    STRUCTURES.register(structure.name, structure)
    return structure


_BY_CURVATURE = "choose by curvature=, kfac_approx=, mc_samples= and backend="
_IN_LAPLACE_TORCH = {
    "enable_backprop": "pass backprop=True to the prediction",
    "backend_kwargs": _BY_CURVATURE,
    "asdl_fisher_kwargs": _BY_CURVATURE,
    "feature_reduction": "reduce the features in the model",
}
"""Options that users of laplace-torch know, and what replaces them."""


def make_structure(name: str, options: Mapping[str, Any], other_options: Iterable[str] = ()) -> Structure:
    """A structure with its options.

    Args:
        name: of the structure.
        options: of the structure, by name.
        other_options: those that posteriors of any structure take, as suggestions for a mistyped one.

    Raises:
        TypeError: no structure has such an option.
        ValueError: there is no structure of this name, or it does not have an option that others have.
    """
    structure = STRUCTURES[name]
    for option in options:
        if option in structure.option_names():
            continue
        owners = [repr(other) for other, s in STRUCTURES.items() if option in s.option_names()]
        if owners:
            raise ValueError(f"{option} is for hessian_structure={' and '.join(owners)}, not {name!r}; leave it out.")
        near = nearest(option, {*other_options, *(o for s in STRUCTURES.values() for o in s.option_names())})
        mend = _IN_LAPLACE_TORCH.get(option) or ("see Laplace" if near is None else f"did you mean {near!r}")
        raise TypeError(f"Laplace has no option {option!r}; {mend}.")
    return structure(**options)
