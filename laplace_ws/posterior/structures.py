"""The structures of the toolkit: Kronecker factors, with or without corrected eigenvalues, diagonal, full, and low rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from laplace_ws.curvature.backend import evaluation_mode
from laplace_ws.curvature.batches import Batches
from laplace_ws.curvature.forward import check_forward, probe
from laplace_ws.curvature.inputs import ModelInputs
from laplace_ws.curvature.lowrank import low_rank_curvature
from laplace_ws.distributed import Processes
from laplace_ws.kfac import (
    DenseAccumulator,
    DiagAccumulator,
    EkfacAccumulator,
    FactorPrecision,
    KfacApprox,
    KfacApproxSpec,
    KronAccumulator,
    approximation_by_parameter,
)
from laplace_ws.matrices import CurvatureMatrix, Dense, Diag, Ekfac, Kron, LowRank
from laplace_ws.matrices.division import decompose, decompose_now
from laplace_ws.posterior.network import Network
from laplace_ws.posterior.precision import PosteriorPrecision
from laplace_ws.posterior.structure import DataCurvature, Problem, Structure, register_structure
from laplace_ws.values import whole_number


@dataclass(frozen=True)
class FactorOptions:
    """Which Kronecker factors, and at what precision.

    Attributes:
        kfac_approx: "auto", "expand", "reduce", or a mapping from patterns of parameter names to these.
        factor_precision: of the products that make up the factors: "float32", "tf32" or "bf16", see `FactorPrecision`.
        max_factor_dim: rows of the widest factor that is kept whole; of wider ones only the diagonal is computed. None for no limit.
    """

    kfac_approx: KfacApproxSpec = "auto"
    factor_precision: str | FactorPrecision = FactorPrecision.FLOAT32
    max_factor_dim: int | None = None

    def __post_init__(self) -> None:
        if self.max_factor_dim is not None:
            whole_number("max_factor_dim", self.max_factor_dim, least=1)

    def bound(self, parameter_names: Sequence[str]) -> Any:
        """See `Structure.bound`: an approximation for each parameter."""
        approximations = approximation_by_parameter(self.kfac_approx, parameter_names)
        return replace(self, kfac_approx=approximations, factor_precision=FactorPrecision(self.factor_precision))

    def options(self) -> dict[str, Any]:
        """See `Structure.options`."""
        approximations = {name: KfacApprox(approx).value for name, approx in self._by_parameter.items()}
        return {
            "kfac_approx": approximations,
            "factor_precision": FactorPrecision(self.factor_precision).value,
            "max_factor_dim": self.max_factor_dim,
        }

    def resolved(self, network: Network) -> dict[str, Any]:
        """See `Structure.resolved`: "auto" as expand or reduce."""
        found = network.check.in_reduce_setting
        approximations = {name: approx.decided(name in found).value for name, approx in self._by_parameter.items()}
        return {**self.options(), "kfac_approx": approximations}

    def accumulator(self, parameters: Mapping[str, nn.Parameter]) -> KronAccumulator:
        """The sums of the factors of a bound structure."""
        return KronAccumulator(parameters, self._by_parameter, self.factor_precision, self.max_factor_dim)

    def check(self, problem: Problem, x: ModelInputs) -> None:
        """See `Structure.check`."""
        problem.check(x, self.accumulator)

    @property
    def _by_parameter(self) -> Mapping[str, KfacApprox]:
        assert isinstance(self.kfac_approx, Mapping), "bound(parameter_names) comes first"
        return self.kfac_approx  # type: ignore[return-value]


@register_structure
@dataclass(frozen=True)
class KronStructure(FactorOptions, Structure):
    """One Kronecker product for each parameter."""

    name = "kron"
    matrix = Kron
    prior_per_weight = False

    def curvature(self, problem: Problem, batches: Batches, before: CurvatureMatrix | None) -> DataCurvature:
        """See `Structure.curvature`."""
        return problem.accumulate(batches, self.accumulator)

    def prepare(self, H: CurvatureMatrix, processes: Processes) -> None:
        """See `Structure.prepare`: the eigenvalues, each block's by one process."""
        assert isinstance(H, Kron)
        decompose(H, processes, vectors=False)

    def decompose(self, H: CurvatureMatrix, processes: Processes, *, progress_bar: bool = False) -> None:
        """See `Structure.decompose`: the eigenvectors, and the eigenvalues with them."""
        assert isinstance(H, Kron)
        decompose_now(H, processes, progress_bar=progress_bar)


@register_structure
@dataclass(frozen=True)
class EkfacStructure(FactorOptions, Structure):
    """Diagonal in the eigenvectors of Kronecker factors [George et al. 2018].

    The eigenvalues are not products of those of the factors but the second moments of the gradients in this eigenbasis: of all matrices
    with these eigenvectors, this one is closest to the curvature. A fit passes over the data twice, for the eigenvectors and for the
    eigenvalues; data that are added to a fit keep its eigenvectors.
    """

    name = "ekfac"
    matrix = Ekfac
    prior_per_weight = False
    reads_data_again = True

    def curvature(self, problem: Problem, batches: Batches, before: CurvatureMatrix | None) -> DataCurvature:
        """See `Structure.curvature`."""
        factors = problem.accumulate(batches, self.accumulator).H if before is None else before
        assert isinstance(factors, (Kron, Ekfac))
        if isinstance(factors, Kron):
            decompose(factors, batches.processes, vectors=True)
        bases = {name: block.basis for name, block in factors.items()}
        return problem.accumulate(batches, lambda parameters: EkfacAccumulator(parameters, bases))


class WeightSums:
    """What structures share that sum up gradients weight by weight, over all weights of a parameter or over some.

    Attributes:
        accumulator: the sums.
    """

    accumulator: ClassVar[type[DiagAccumulator | DenseAccumulator]]
    covers_single_weights = True

    def curvature(self, problem: Problem, batches: Batches, before: CurvatureMatrix | None) -> DataCurvature:
        """See `Structure.curvature`."""
        return problem.accumulate(batches, lambda p: self.accumulator(p, problem.network.subset.selection))

    def check(self, problem: Problem, x: ModelInputs) -> None:
        """See `Structure.check`."""
        problem.check(x, lambda p: self.accumulator(p, problem.network.subset.selection))

    def posterior_precision(self, precision: PosteriorPrecision) -> Tensor:
        """H/τ + Δ in float64: its diagonal `[P]`, or the whole of it `[P, P]`."""
        assert isinstance(precision.H, (Diag, Dense))
        return precision.H.damped(precision.scale, precision.delta)


@register_structure
@dataclass(frozen=True)
class DiagStructure(WeightSums, Structure):
    """Diagonal: all weights are independent."""

    name = "diag"
    matrix = Diag
    accumulator = DiagAccumulator


@register_structure
@dataclass(frozen=True)
class FullStructure(WeightSums, Structure):
    """All covariances, for small models."""

    name = "full"
    matrix = Dense
    accumulator = DenseAccumulator


@register_structure
@dataclass(frozen=True)
class LowRankStructure(Structure):
    """The directions about which the data are most informative, across layers; in all others the posterior is the prior.

    A fit finds the leading eigenpairs by Lanczos' method without a backend, so it covers any network that can be differentiated twice. It
    takes two to four passes over the data for each pair, and at least 22. Predictions work for the same networks; those by the linearised
    network take a backward pass for each example and output where the backend cannot cover it.

    Attributes:
        rank: largest number of eigenpairs.
    """

    name = "lowrank"
    matrix = LowRank
    reads_data_again = True
    needs_same_data = True
    rank: int = 20

    def __post_init__(self) -> None:
        whole_number("rank", self.rank, least=1)

    def curvature(self, problem: Problem, batches: Batches, before: CurvatureMatrix | None) -> DataCurvature:
        """See `Structure.curvature`."""
        found = low_rank_curvature(
            problem.network.model,
            problem.unit_likelihood,
            batches,
            rank=self.rank,
            curvature=problem.curvature,
            mc_samples=problem.mc_samples,
            generator=problem.generator,
            parameters=problem.network.parameters(),
        )
        return DataCurvature(found.H, found.totals)

    def check(self, problem: Problem, x: ModelInputs) -> None:
        """See `Structure.check`: it requires less of a model than the others."""
        network = problem.network
        with evaluation_mode(network.model, network.parameters()):
            check_forward(network.model, probe(x))
