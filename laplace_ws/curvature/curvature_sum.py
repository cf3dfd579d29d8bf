"""Curvature of the summed negative log likelihood over a data set, with any backend."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws.curvature.backend import (
    Backend,
    Linearisation,
    evaluation_mode,
    trainable_parameters,
)
from laplace_ws.curvature.backends import make_backend
from laplace_ws.curvature.batches import Batches, Data
from laplace_ws.curvature.checks import LinearisationCheck, check_linearisation
from laplace_ws.curvature.columns import Curvature, loss_columns, stream_columns
from laplace_ws.curvature.finite import check_finite, check_finite_curvature, check_finite_gradients
from laplace_ws.curvature.graph_inputs import parts_told_apart
from laplace_ws.curvature.inputs import BatchKeys, ModelInputs, as_inputs, check_devices, own_copy
from laplace_ws.curvature.last_layer import layer_of_outputs
from laplace_ws.curvature.models import check_visible
from laplace_ws.curvature.processes import Shard
from laplace_ws.curvature.totals import DataTotals
from laplace_ws.curvature.watch import warn_of_final_operation
from laplace_ws.errors import InvalidBatchError, UnsupportedParameterError
from laplace_ws.kfac import (
    Accumulator,
    FactorPrecision,
    KfacApproxSpec,
    KronAccumulator,
    approximation_by_parameter,
    example_gradients,
)
from laplace_ws.kfac.factors import total
from laplace_ws.likelihoods import Likelihood, make_likelihood
from laplace_ws.matrices import CurvatureMatrix, Kron
from laplace_ws.values import generator_or_none, whole_number

SMALLEST_PART = 8
"""Examples in the smallest part of a batch; smaller parts would cost time."""


def default_generator(device: torch.device) -> torch.Generator:
    """A separate generator: reproducible after `torch.manual_seed`, and independent of what torch itself draws.

    Two that are made under the same seed give the same numbers; pass a generator to get independent draws the second time.
    """
    seed = hashlib.sha256(f"laplace_ws {torch.initial_seed()}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(seed[:8], "big") % 2**63)


class CurvatureSum:
    """Sums of negative log likelihood and curvature over batches: the result of one pass over the data.

    Args:
        model: the network; each batch is run in eval mode and the model is left as it was.
        likelihood: p(y | f).
        make_accumulator: makes the accumulator of the matrix to sum, given the covered parameters.
        curvature: which columns are back-propagated.
        backend: the backend that runs the model.
        mc_samples: random columns M per example, for `ggn_mc` and `ggn_mc_rademacher`.
        generator: source of the labels or signs.
        check: the check of this backend and model, with its findings from earlier passes; default: a new one.
        parameters: those that are covered, by name; by default all that require grad.

    Attributes:
        totals: sums of everything else.
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
        check: LinearisationCheck | None = None,
        parameters: Mapping[str, nn.Parameter] | None = None,
    ):
        mc_samples = whole_number("mc_samples", mc_samples, least=1)
        self.model = model
        self.likelihood = likelihood
        self.parameters: dict[str, nn.Parameter] = trainable_parameters(model, parameters)
        self.accumulator: Accumulator = make_accumulator(self.parameters)
        self.curvature = curvature
        self.backend = backend
        self.mc_samples = mc_samples
        self.generator: torch.Generator = generator_or_none("generator", generator) or default_generator(
            next(iter(self.parameters.values())).device
        )
        self.totals: DataTotals = DataTotals()
        self._check = check or LinearisationCheck(backend, model)
        self._shard: Shard | None = None

    def add_all(self, data: Data) -> None:
        """Add all batches, of one of the forms that `inputs.split_batch` knows.

        Raises:
            InvalidBatchError: no batch, or one that does not fit the model or the likelihood.
            UnsupportedParameterError: a parameter cannot be covered.
        """
        batches = Batches.of(data, self.model)
        self._shard = batches.shard
        processes = batches.processes
        with processes.together("a pass over the data"):
            for x, y in replace(batches, on_empty=self._add_nothing):
                self.add(x, y)
            if processes.size > 1 and not self.totals.n_examples:
                raise InvalidBatchError(
                    f"process {processes.rank} of {processes.size} has no example; give each at least one, or start fewer processes."
                )
            self.totals = total(processes.gather(self.totals))
            self.totals.check_not_empty(self.likelihood)
            self.accumulator.sum_over(processes)

    @property
    def final_operation(self) -> str | None:
        """What makes the outputs into probabilities, see `watch.final_operation`."""
        return self._check.final_operation

    def result(self) -> CurvatureMatrix:
        """The curvature summed over all batches so far.

        Raises:
            InvalidBatchError: it is not finite.
        """
        H = self.accumulator.result()
        check_finite_curvature(H)
        return H

    def add(self, x: ModelInputs, y: Tensor) -> None:
        """Add one batch: the inputs of the model and the targets."""
        with evaluation_mode(self.model, self.parameters):
            if not self.totals.n_examples:
                self.backend.forget()
                self._check.start(x, self.parameters)
                if self._shard is not None:  # processes that see other examples must come to one decision
                    first, *others = self._shard.processes.gather(self._check.in_reduce_setting)
                    self._check.in_reduce_setting = first.intersection(*others)
            for part in parts_told_apart(x, self._parts(x, y)):
                self._add_checked(x[part], y[part])

    def _parts(self, x: ModelInputs, y: Tensor) -> list[slice]:
        """The examples of a batch, split into parts where many columns need what the forward pass stores, and that is large.

        A training step frees its activations as it goes back through them; a part, kept, takes no more memory than that, and no longer.
        """
        n = len(x)
        if y.shape[:1] != (n,):
            return [slice(None)]  # for the likelihood, which says what does not fit
        n_parts = self._check.n_parts(n, x.device) if self.curvature is Curvature.GGN else 1
        n_parts = max(1, min(n_parts, n // SMALLEST_PART))
        edges = [n * part // n_parts for part in range(n_parts + 1)]
        return [slice(start, end) for start, end in pairwise(edges)]

    def _add_checked(self, x: ModelInputs, y: Tensor) -> None:
        if self._add(x, y):
            return
        self._check.run(x)
        if not self._add(x, y):
            raise UnsupportedParameterError(
                f"{type(self.model).__name__} uses its parameters otherwise whenever it is run on one batch; take out what changes from "
                "call to call in its forward pass."
            )

    def _add(self, x: ModelInputs, y: Tensor) -> bool:
        """Add one batch if its uses are like those that were checked; returns whether they are."""
        with self.backend.linearise(self.model, own_copy(x), self.parameters) as linearisation:
            if not self._check.knows(linearisation.uses):
                return False
            f = linearisation.outputs
            if not self.totals.n_examples:
                check_finite(self.model, f)
            self.likelihood.check(f, y)
            of_batch = DataTotals()
            of_batch.add(self.likelihood, f, y)
            with torch.autocast(x.device.type, enabled=False):
                self._add_curvature(linearisation, y)
        self.totals += of_batch
        return True

    def _add_curvature(self, linearisation: Linearisation, y: Tensor) -> None:
        f = linearisation.outputs
        self.accumulator.start_batch(linearisation.uses, self._check.in_reduce_setting)
        column = self._root_of_diagonal(linearisation, y)
        linearisation.forget_uses()
        stream_columns(linearisation, self._columns(f, y) if column is None else iter([column]), self.accumulator)
        self.accumulator.end_batch()

    def _root_of_diagonal(self, linearisation: Linearisation, y: Tensor) -> Tensor | None:
        """One column in place of those of the GGN, where their squares alone count and the outputs are those of the one covered layer."""
        if self.curvature is not Curvature.GGN or not self.accumulator.needs_squares_alone:
            return None
        f = linearisation.outputs
        column = self.likelihood.root_of_diagonal(f, self.likelihood.term_mask(f, y))
        return None if column is None or layer_of_outputs(linearisation) is None else column

    def _columns(self, f: Tensor, y: Tensor) -> Iterator[Tensor]:
        """The columns of a batch. Random ones of several processes are those that one process draws for the batch of all."""
        options: dict[str, Any] = {"mc_samples": self.mc_samples, "generator": self.generator}
        if self._shard is None or not self.curvature.is_random:
            yield from loss_columns(self.likelihood, self.curvature, f, y, **options)
            return
        f_all, y_all = self._of_all(f, y)
        own = self._shard.own(len(f_all))
        for column in loss_columns(self.likelihood, self.curvature, f_all, y_all, **options):
            yield column[own]

    def _of_all(self, f: Tensor | None, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs and targets of the batch of all processes; None from one that has no example left."""
        assert self._shard is not None
        of_each = self._shard.processes.gather(None if f is None or y is None else (f.cpu(), y.cpu()))
        like = next(pair for pair in of_each if pair is not None)
        pairs = [tuple(t[:0] for t in like) if pair is None else pair for pair in of_each]
        outputs, targets = (self._shard.interleaved(rows) for rows in zip(*pairs, strict=True))
        device = next(iter(self.parameters.values())).device
        return outputs.to(device), targets.to(device)

    def _add_nothing(self) -> None:
        """Take part in a batch of which no example is left for this process."""
        if self.curvature.is_random:
            f, y = self._of_all(None, None)
            options: dict[str, Any] = {"mc_samples": self.mc_samples, "generator": self.generator}
            for _ in loss_columns(self.likelihood, self.curvature, f, y, **options):
                pass  # draw what the others draw


def jacobians(
    model: nn.Module, x: Any, *, backend: str | Backend = "native"
) -> tuple[Float[Tensor, "N D P"], Float[Tensor, "N D"]]:
    """Jacobians ∂f/∂θ of each example, and the outputs f.

    Args:
        model: the network; run in eval mode and left as it was.
        x: inputs, one argument of the model, or `inputs.as_inputs(x1, x2, …)` of several.
        backend: "native", "asdl", "backpack", "autograd" (slow, without Kronecker factors), or a `Backend`.

    Returns:
        The Jacobians over the parameters that require grad, in the order of `model.named_parameters()`, each flattened row-major, and the
        outputs, flattened to D for each example.

    Raises:
        UnsupportedParameterError: a parameter that requires grad cannot be covered.
        InvalidBatchError: the inputs do not fit the model, or the Jacobians are not finite.
    """
    x = as_inputs(x)
    parameters = trainable_parameters(model)
    check_visible(model, parameters.values())
    check_devices(next(model.parameters()).device, x)
    backend = make_backend(backend)
    with evaluation_mode(model):
        check_linearisation(backend, model, x, parameters)
        with backend.linearise(model, own_copy(x), parameters) as linearisation:
            f = linearisation.outputs.reshape(len(x), -1)
            columns = torch.eye(f.shape[1], dtype=f.dtype, device=f.device)
            columns = columns[:, None].expand(-1, len(x), -1).reshape(-1, *linearisation.outputs.shape)
            rows: list[Tensor] = []
            for chunk in torch.split(columns, linearisation.columns_at_once):
                g = linearisation.pullback(chunk)
                of_each = [example_gradients(name, linearisation.uses, g).flatten(2) for name in parameters]
                rows.append(torch.cat(of_each, dim=2))  # [K, N, P]
    J = torch.cat(rows).transpose(0, 1)
    ends = [0, *accumulate(p.numel() for p in parameters.values())]
    check_finite_gradients({name: J[..., i:k] for name, (i, k) in zip(parameters, pairwise(ends), strict=True)})
    return J, f


def kron_factors(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Data,
    *,
    curvature: str | Curvature = "ggn",
    kfac_approx: KfacApproxSpec = "auto",
    backend: str | Backend = "native",
    mc_samples: int = 1,
    generator: torch.Generator | None = None,
    factor_precision: str | FactorPrecision = "float32",
    max_factor_dim: int | None = None,
    dict_key_x: str = BatchKeys.x,
    dict_key_y: str = BatchKeys.y,
) -> Kron:
    """Kronecker factors of the curvature of the summed negative log likelihood.

    Args:
        model: the network; run in eval mode and left as it was.
        likelihood: "classification", "regression", "heteroscedastic_regression", "binary", "reward_modeling" or a
            `Likelihood`.
        data: iterable of batches: pairs (x, y), rows (x1, x2, …, y) for `model(x1, x2, …)`, or mappings, see `inputs.split_batch`.
        curvature: "ggn" (exact columns), "ggn_mc" (sampled labels), "ggn_mc_rademacher" (random signs) or "ef" (empirical Fisher).
        kfac_approx: "auto", "expand", "reduce", or a mapping from patterns of parameter names to them.
        backend: "native", "asdl", "backpack", or a `Backend`, which runs the model; the numbers are the same.
        mc_samples: random columns per example, for "ggn_mc" and "ggn_mc_rademacher".
        generator: source of the labels or signs; by default a separate one, which `torch.manual_seed` makes reproducible.
        factor_precision: precision of the products that make up the factors: "float32", "tf32" or "bf16", see `FactorPrecision`.
        max_factor_dim: of a factor with more rows only the diagonal is computed; None for no limit.
        dict_key_x: of batches that are mappings, the entry that determines the number of examples and the device.
        dict_key_y: of batches that are mappings, the targets; the model is called with the mapping of everything else.

    Returns:
        A mapping from parameter name to its block: `kron[name].to_dense()` is the block of the curvature over the parameter
        flattened row-major, `kron[name].A` (a mean over the data) and `.B` (a sum over the data) its factors.

    Raises:
        UnsupportedParameterError: a parameter that requires grad cannot be covered.
        InvalidBatchError: the data do not fit the model or the likelihood, or the factors are not finite.
    """

    if max_factor_dim is not None:
        whole_number("max_factor_dim", max_factor_dim, least=1)

    def make_accumulator(parameters: Mapping[str, nn.Parameter]) -> KronAccumulator:
        approximations = approximation_by_parameter(kfac_approx, list(parameters))
        return KronAccumulator(parameters, approximations, factor_precision, max_factor_dim)

    sums = CurvatureSum(
        model,
        make_likelihood(likelihood),
        make_accumulator,
        curvature=Curvature(curvature),
        backend=make_backend(backend),
        mc_samples=mc_samples,
        generator=generator,
    )
    sums.add_all(Batches.of(data, model, BatchKeys(dict_key_x, dict_key_y)))
    warn_of_final_operation(model, sums.likelihood, sums.final_operation)
    return sums.result()  # type: ignore[return-value]
