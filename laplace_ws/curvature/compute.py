"""Curvature of the summed negative log likelihood over a data set, with any backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws.curvature.backend import Backend, Linearisation, check_devices, evaluation_mode, trainable_parameters
from laplace_ws.curvature.native import NativeBackend
from laplace_ws.errors import InvalidBatchError, UnsupportedParameterError
from laplace_ws.kfac.accumulate import Accumulator, DenseAccumulator, DiagAccumulator, KronAccumulator
from laplace_ws.kfac.approximation import KfacApproxSpec, approximation_by_parameter
from laplace_ws.likelihoods import Likelihood, make_likelihood
from laplace_ws.matrices import Kron

Batches = Iterable[tuple[Tensor, Tensor]]


class Curvature(str, Enum):
    """Which curvature of the negative log likelihood is taken.

    `GGN`: all columns of the generalised Gauss-Newton matrix, exact. `GGN_MC`: columns drawn from the model's own predictive, unbiased.
    `EF`: the empirical Fisher, gradients at the observed labels.
    """

    GGN = "ggn"
    GGN_MC = "ggn_mc"
    EF = "ef"


BACKENDS: dict[str, type[Backend]] = {NativeBackend.name: NativeBackend}


def parse_curvature(value: str | Curvature) -> Curvature:
    """Turn a string into a `Curvature`."""
    try:
        return Curvature(value)
    except ValueError:
        raise ValueError(
            f"unknown curvature {value!r}: choose one of {', '.join(repr(m.value) for m in Curvature)}."
        ) from None


def make_backend(backend: str | Backend) -> Backend:
    """Turn a name into its backend; a `Backend` passes through."""
    if isinstance(backend, Backend):
        return backend
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(map(repr, BACKENDS))}.")
    return BACKENDS[backend]()


def default_generator(device: torch.device) -> torch.Generator:
    """A generator of our own, seeded as torch is: reproducible after `torch.manual_seed`, which it leaves alone."""
    return torch.Generator(device).manual_seed(torch.initial_seed() % 2**63)


class CurvatureSum:
    """Sums of negative log likelihood and curvature over batches: what one pass over the data gives.

    Args:
        model: the network; each batch is run in eval mode and the model is left as it was.
        likelihood: p(y | f).
        make_accumulator: which matrix to sum, given the parameters that require grad.
        curvature: which columns are back-propagated.
        backend: who runs the model.
        mc_samples: label samples M an example, for `ggn_mc`.
        generator: source of the label samples.

    Attributes:
        nll_sum: summed negative log likelihood, in nats, float64.
        n_examples: examples seen.
        n_targets: scalar targets or loss terms seen.
        output_shape: shape of the model's output for one example.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        make_accumulator: Callable[[Mapping[str, nn.Parameter]], Accumulator],
        *,
        curvature: Curvature,
        backend: Backend,
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
    ):
        if mc_samples < 1:
            raise ValueError(f"mc_samples must be at least 1, got {mc_samples}.")
        self.model = model
        self.likelihood = likelihood
        self.parameters = trainable_parameters(model)
        self.accumulator = make_accumulator(self.parameters)
        self.curvature = curvature
        self.backend = backend
        self.mc_samples = mc_samples
        self.generator = generator or default_generator(next(iter(self.parameters.values())).device)
        self.nll_sum = 0.0
        self.n_examples = 0
        self.n_targets = 0
        self.output_shape: tuple[int, ...] | None = None

    def add_all(self, data: Batches) -> None:
        """Add every batch of an iterable.

        Raises:
            InvalidBatchError: no batch, or one that does not fit the model or the likelihood.
            UnsupportedParameterError: a parameter cannot be covered.
        """
        for x, y in data:
            self.add(x, y)
        if not self.n_examples:
            raise InvalidBatchError(
                "the data hold no example; give an iterable of batches (x, y) that is not empty or used up."
            )

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add one batch."""
        check_devices(self.model, x, y)
        with evaluation_mode(self.model):
            linearisation = self.backend.linearise(self.model, x, self.parameters)
            f, uses = linearisation.outputs, linearisation.uses
            self.likelihood.check(f, y)
            nll = self.likelihood.nll_sum(f, y).item()
            if not torch.isfinite(torch.tensor(nll)):
                raise InvalidBatchError(
                    f"the negative log likelihood of a batch is {nll}; the model or its inputs are not finite."
                )
            if not self.n_examples:
                check_rows_by_example(linearisation)
            self.accumulator.start_batch(uses, f.ndim)
            for column in self._columns(f, y):
                self.accumulator.add_columns(uses, linearisation.pullback(column[None]))
        self.nll_sum += nll
        self.n_examples += len(x)
        self.n_targets += y.numel()
        self.output_shape = tuple(f.shape[1:])

    def _columns(self, f: Tensor, y: Tensor) -> Iterator[Float[Tensor, "N ..."]]:
        if self.curvature is Curvature.GGN:
            yield from self.likelihood.hessian_columns(f)
        elif self.curvature is Curvature.EF:
            yield self.likelihood.gradient_column(f, y)
        else:
            for _ in range(self.mc_samples):
                yield self.likelihood.sampled_column(f, self.generator) / self.mc_samples**0.5


def check_rows_by_example(linearisation: Linearisation) -> None:
    """Raise unless the rows of every use belong to the examples that their position says.

    A model that puts another axis first (time, say), or that mixes examples, would give factors of a wrong scale in silence. So pull back
    a vector that is zero for every other example: their rows must be zero at every use.
    """
    f = linearisation.outputs
    if len(f) == 1:
        return
    probe = torch.ones_like(f)
    probe[::2] = 0
    for use, (g,) in zip(linearisation.uses, linearisation.pullback(probe[None]), strict=True):
        by_example = g.reshape(use.n_examples, -1)
        if by_example[::2].count_nonzero():
            raise UnsupportedParameterError(
                f"{use.parameters[0]!r} is used by {use.call} with rows that are not grouped by example: put the batch axis "
                "first, and keep the examples of a batch apart, or freeze it (requires_grad_(False))."
            )


def kron_factors(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Batches,
    *,
    curvature: str | Curvature = "ggn",
    kfac_approx: KfacApproxSpec = "auto",
    backend: str | Backend = "native",
    mc_samples: int = 1,
    generator: torch.Generator | None = None,
) -> Kron:
    """Kronecker factors of the curvature of the summed negative log likelihood.

    Args:
        model: the network; run in eval mode and left as it was.
        likelihood: "classification", "regression", "binary" or a `Likelihood`.
        data: iterable of batches (x, y).
        curvature: "ggn" (exact columns), "ggn_mc" (sampled labels) or "ef" (empirical Fisher).
        kfac_approx: "auto", "expand", "reduce", or a mapping from patterns of parameter names to them.
        backend: "native", or a `Backend`.
        mc_samples: label samples an example, for "ggn_mc".
        generator: source of the label samples; by default one of our own, seeded as torch is.

    Returns:
        A mapping from parameter name to its block: `kron[name].to_dense()` is the block of the curvature over the parameter
        flattened row-major, `kron[name].A` (a mean over the data) and `.B` (a sum over the data) its factors.

    Raises:
        UnsupportedParameterError: a parameter that requires grad cannot be covered.
        InvalidBatchError: the data do not fit the model or the likelihood.
    """

    def make_accumulator(parameters: Mapping[str, nn.Parameter]) -> KronAccumulator:
        return KronAccumulator(parameters, approximation_by_parameter(kfac_approx, list(parameters)))

    total = CurvatureSum(
        model,
        make_likelihood(likelihood),
        make_accumulator,
        curvature=parse_curvature(curvature),
        backend=make_backend(backend),
        mc_samples=mc_samples,
        generator=generator,
    )
    total.add_all(data)
    return total.accumulator.result()  # type: ignore[return-value]


__all__ = [
    "BACKENDS",
    "Batches",
    "Curvature",
    "CurvatureSum",
    "DenseAccumulator",
    "DiagAccumulator",
    "kron_factors",
    "make_backend",
    "parse_curvature",
]
