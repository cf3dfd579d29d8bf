"""Products of the curvature with vectors, without the matrix and without a backend: covers every model that can be differentiated twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws.curvature.backend import differentiable_twice, evaluation_mode, trainable_parameters
from laplace_ws.curvature.batches import Batches, Data
from laplace_ws.curvature.columns import Curvature, loss_columns
from laplace_ws.curvature.curvature_sum import default_generator
from laplace_ws.curvature.finite import check_finite_gradients
from laplace_ws.curvature.forward import check_forward, check_has_gradient, precision, probe
from laplace_ws.curvature.inputs import DEFAULT_KEYS, BatchKeys, call_model, own_copy
from laplace_ws.curvature.jacobian import JacobianProducts
from laplace_ws.curvature.models import check_visible
from laplace_ws.curvature.totals import DataTotals
from laplace_ws.errors import InvalidBatchError, UnsupportedParameterError
from laplace_ws.likelihoods import Likelihood, make_likelihood
from laplace_ws.values import generator_or_none, shown, whole_number


@dataclass
class PassTotals(DataTotals):
    """The totals of one pass over the data, and what distinguishes it from a pass over other data.

    Attributes:
        nll_size: Σ |negative log likelihood| of the batches, by which the rounding of `nll_sum` is judged.
        order: a sum of the outputs that depends on the order of the examples.
        order_size: Σ |·| of what `order` sums.
        eps: machine precision of the outputs, and of what they are computed in.
    """

    nll_size: float = 0.0
    order: float = 0.0
    order_size: float = 0.0
    eps: float = 0.0

    def add_precise(self, likelihood: Likelihood, f: Float[Tensor, "N ..."], y: Tensor, eps: float) -> None:
        """Add one batch, whose outputs are precise to eps; see `DataTotals.add`."""
        of_examples = f.double().reshape(len(f), -1)
        places = torch.arange(self.n_examples, self.n_examples + len(f), device=f.device).double()
        self.nll_size += abs(self.add(likelihood, f, y))
        self.order += (places @ of_examples).sum().item()
        self.order_size += (places @ of_examples.abs()).sum().item()
        self.eps = max(self.eps, eps)

    def has_same_examples(self, other: PassTotals) -> bool:
        """Whether the other pass saw the same examples, in any order, as far as the likelihood can show."""
        is_close = abs(self.nll_sum - other.nll_sum) <= self._rounding * max(self.nll_size, other.nll_size)
        return is_close and (self.n_examples, self.n_targets) == (other.n_examples, other.n_targets)

    def has_same_order(self, other: PassTotals) -> bool:
        """Whether the other pass saw them in the same order, as far as the outputs can show."""
        return abs(self.order - other.order) <= self._rounding * max(self.order_size, other.order_size)

    def __add__(self, other: PassTotals) -> PassTotals:  # type: ignore[override]
        """The totals of two shares of the data."""
        sums = super().__add__(other)
        assert isinstance(sums, PassTotals)
        return replace(
            sums,
            nll_size=self.nll_size + other.nll_size,
            order=self.order + other.order,
            order_size=self.order_size + other.order_size,
            eps=max(self.eps, other.eps),
        )

    @property
    def _rounding(self) -> float:
        """Relative difference that another split of the same examples into batches may make: far below that of other examples."""
        return min(1000 * self.eps, 0.01)


class CurvatureProducts:
    """H v, H the curvature of the summed negative log likelihood over a data set, one pass over the data for each product.

    H v = Σ_n Σ_c J_nᵀ s_nc s_ncᵀ J_n v [Schraudolph 2002]. J v is the derivative of Jᵀ u with respect to u, so the model has to be twice
    differentiable; nothing else is required, as no layer needs a Kronecker block. Parameters without a gradient have rows of zeros.
    The random columns of `ggn_mc` and `ggn_mc_rademacher` are the same in every product.

    Args:
        model: the network; each batch is run in eval mode and the model is left as it was.
        likelihood: "classification", "regression", "binary" or a `Likelihood`.
        data: batches that can be iterated again and again, the same examples each time, in any order unless the columns are random.
        curvature: "ggn", "ggn_mc", "ggn_mc_rademacher" or "ef".
        mc_samples: random columns per example, for "ggn_mc" and "ggn_mc_rademacher".
        generator: source of the labels or signs; by default a separate one, which `torch.manual_seed` makes reproducible.
        keys: keys of batches that are mappings.
        parameters: those that are covered, by name; by default all that require grad.

    Attributes:
        shapes: shape of each covered parameter, by name: the order of v, each flattened row-major.
        dtype: the precision that the parameters require: float64 if any has it, else float32.
        device: where they are.
        totals: the totals of the first pass over the data; None before it.
        n_products: number of passes over the data so far.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        data: Data,
        *,
        curvature: str | Curvature = "ggn",
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
        keys: BatchKeys = DEFAULT_KEYS,
        parameters: Mapping[str, nn.Parameter] | None = None,
    ):
        mc_samples = whole_number("mc_samples", mc_samples, least=1)
        batches = Batches.of(data, model, keys)
        if batches.is_one_pass:
            raise InvalidBatchError(
                f"the data are read once for every product, but a {type(batches.loader).__name__} is used up after the first; give a "
                "DataLoader or a list of batches."
            )
        if batches.processes.size > 1 and Curvature(curvature).is_random:
            raise InvalidBatchError(
                f"the random columns of {Curvature(curvature).value!r} are not drawn alike by several processes; "
                'choose curvature="ggn".'
            )
        self.model = model
        self.likelihood: Likelihood = make_likelihood(likelihood)
        self.batches = batches
        self.curvature: Curvature = Curvature(curvature)
        self.mc_samples = mc_samples
        self.parameters: dict[str, nn.Parameter] = trainable_parameters(model, parameters)
        tensors = list(self.parameters.values())
        check_visible(model, tensors)
        self.shapes: dict[str, torch.Size] = {name: p.shape for name, p in self.parameters.items()}
        self.dtype: torch.dtype = torch.float64 if any(p.dtype == torch.float64 for p in tensors) else torch.float32
        self.device: torch.device = tensors[0].device
        self.totals: PassTotals | None = None
        self.n_products: int = 0
        self._sizes = [p.numel() for p in tensors]
        self._generator = generator_or_none("generator", generator) or default_generator(self.device)
        self._first_draw = self._generator.get_state()

    @property
    def n_params(self) -> int:
        """P, the number of weights."""
        return sum(self._sizes)

    def product(self, vectors: Float[Tensor, "S P"]) -> Float[Tensor, "S P"]:
        """H v for each row v, all in one pass over the data, summed in float64.

        Raises:
            InvalidBatchError: the data do not fit the model or the likelihood, or they differ from those of the first pass.
            UnsupportedParameterError: the gradients of the model cannot be differentiated, there are none, or the forward pass is random or
                mixes the examples of a batch.
        """
        if not isinstance(vectors, Tensor) or vectors.shape[1:] != (self.n_params,) or not vectors.is_floating_point():  # pyright: ignore
            raise TypeError(
                f"the vectors must be floating point [S, P] with P={self.n_params}, one in each row, got {shown(vectors)}."
            )
        self._generator.set_state(self._first_draw)
        total = torch.zeros(vectors.shape, dtype=torch.float64, device=self.device)
        totals = PassTotals()
        processes = self.batches.processes
        with processes.together("a product with the curvature"):
            for x, y in self.batches:
                with evaluation_mode(self.model, self.parameters), differentiable_twice(self.model):
                    if self.totals is None and not totals.n_examples:
                        check_forward(self.model, probe(x))
                    f = call_model(self.model, own_copy(x))
                    eps = precision(f, self.parameters.values())
                    self.likelihood.check(f, y)
                    totals.add_precise(self.likelihood, f.detach(), y, eps)
                    with torch.autocast(x.device.type, enabled=False):
                        total += self._product_of_batch(f, y, vectors, eps)
            totals = reduce(add, processes.gather(totals))
            self._check_totals(totals)
            processes.sum_([total])
        self.n_products += 1
        return total.to(vectors.dtype)

    def _product_of_batch(
        self, f: Float[Tensor, "N ..."], y: Tensor, vectors: Float[Tensor, "S P"], eps: float
    ) -> Float[Tensor, "S P"]:
        check_has_gradient(self.model, f)
        pushed = self._pushforward(f, vectors)
        weighted = self._weighted(f.detach(), y, pushed)
        pulled = self._pullback(f, weighted)
        # ⟨u, J v⟩ = ⟨Jᵀ u, v⟩ for u = Λ J v, which fails where a backward pass hides its operations from autograd
        forward, backward = _inner(weighted, pushed), _inner(pulled, vectors)
        sizes = _inner(weighted, weighted) * _inner(pushed, pushed), _inner(pulled, pulled) * _inner(vectors, vectors)
        if not ((forward - backward).abs() <= min(10 * eps**0.5, 0.05) * (sizes[0].sqrt() + sizes[1].sqrt())).all():
            parts = pulled.split(self._sizes, dim=1)
            check_finite_gradients(dict(zip(self.parameters, parts, strict=True)))
            raise UnsupportedParameterError(
                f"the gradients of {type(self.model).__name__} cannot be differentiated: a custom autograd function has a backward pass "
                "that hides what it does from autograd, or a hook changes a gradient; write it with plain calls."
            )
        return pulled

    def _pushforward(self, f: Float[Tensor, "N ..."], vectors: Float[Tensor, "S P"]) -> Float[Tensor, "S N ..."]:
        """J v for each row v."""
        parameters = list(self.parameters.values())
        try:
            products = JacobianProducts(f, parameters)
            rows = []
            for vector in vectors:
                parts = zip(vector.split(self._sizes), parameters, strict=True)
                rows.append(products([part.reshape(p.shape).to(p.dtype) for part, p in parts]))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UnsupportedParameterError(
                f"the gradients of {type(self.model).__name__} cannot be differentiated ({error}); write its forward pass with plain "
                "calls, or choose a structure of the curvature that needs one derivative only."
            ) from error
        return torch.stack(rows)

    def _weighted(
        self, f: Float[Tensor, "N ..."], y: Tensor, pushed: Float[Tensor, "S N ..."]
    ) -> Float[Tensor, "S N ..."]:
        """Σ_c s_c s_cᵀ u for each example, with u its part of each row."""
        per_example = pushed.shape[:2] + (1,) * (pushed.ndim - 2)
        weighted = torch.zeros_like(pushed)
        columns = loss_columns(
            self.likelihood, self.curvature, f, y, mc_samples=self.mc_samples, generator=self._generator
        )
        for column in columns:
            inner = (pushed * column).reshape(*pushed.shape[:2], -1).sum(2)
            weighted += column * inner.reshape(per_example)
        return weighted

    def _pullback(self, f: Float[Tensor, "N ..."], columns: Float[Tensor, "S N ..."]) -> Float[Tensor, "S P"]:
        """Jᵀ u for each row u, in float64."""
        parameters = list(self.parameters.values())
        rows = []
        for column in columns:
            gradients = torch.autograd.grad(
                f, parameters, column, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            rows.append(torch.cat([g.flatten().double() for g in gradients]))
        return torch.stack(rows)

    def _check_totals(self, totals: PassTotals) -> None:
        """Keep the totals of the first pass, and raise if those of a later one differ by more than rounding."""
        totals.check_not_empty(self.likelihood)
        if self.totals is None:
            self.totals = totals
            return
        first, is_random = self.totals, self.curvature.is_random
        if not totals.has_same_examples(first):
            raise InvalidBatchError(
                f"the data differ from pass to pass: {first.n_examples} examples with a negative log likelihood of {first.nll_sum:.8g} "
                f"at first, then {totals.n_examples} with {totals.nll_sum:.8g}; take out augmentation, random subsets and what is random "
                f"in the model{'' if is_random else ' (a new order is fine)'}."
            )
        if is_random and not totals.has_same_order(first):
            raise InvalidBatchError(
                f"the examples come in another order in each pass, and the random columns of {self.curvature.value!r} with them; keep "
                'the order (shuffle=False), or choose curvature="ggn".'
            )


def _inner(a: Float[Tensor, "S ..."], b: Float[Tensor, "S ..."]) -> Float[Tensor, " S"]:
    return (a.double() * b.double()).flatten(1).sum(1)
