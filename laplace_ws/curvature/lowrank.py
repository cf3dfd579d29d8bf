"""The leading eigenpairs of the curvature, by Lanczos' method from products with vectors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn
from tqdm import tqdm

from laplace_ws.curvature.batches import Data
from laplace_ws.curvature.columns import Curvature
from laplace_ws.curvature.finite import check_finite_curvature
from laplace_ws.curvature.inputs import DEFAULT_KEYS, BatchKeys
from laplace_ws.curvature.products import CurvatureProducts
from laplace_ws.curvature.totals import DataTotals
from laplace_ws.likelihoods import Likelihood
from laplace_ws.matrices import LowRank
from laplace_ws.values import whole_number

_ROUNDING = 100
"""Eigenvalues below this many ε of the largest are indistinguishable from zero."""
_N_RESTARTS = 100
"""Restarts of Lanczos' method before it is abandoned; a few are usual."""

Multiply = Callable[[Float[Tensor, "S P"]], Float[Tensor, "S P"]]


@dataclass(frozen=True)
class LowRankFit:
    """What `low_rank_curvature` finds in the data.

    Attributes:
        H: the leading eigenpairs, the largest first.
        totals: sums of everything else.
        n_products: number of passes over the data that it took.
    """

    H: LowRank
    totals: DataTotals
    n_products: int


def low_rank_curvature(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Data,
    *,
    rank: int,
    curvature: str | Curvature = "ggn",
    mc_samples: int = 1,
    generator: torch.Generator | None = None,
    keys: BatchKeys = DEFAULT_KEYS,
    parameters: Mapping[str, nn.Parameter] | None = None,
    progress_bar: bool = False,
) -> LowRankFit:
    """The leading eigenpairs of the curvature of the summed negative log likelihood.

    Takes about 2·rank passes over the data, at least 22, each at the cost of three training steps per batch, and more where the eigenvalues
    lie close together. The eigenvalues are exact up to rounding, the eigenvectors up to its square root. Where a Lanczos basis would be
    as large as the matrix itself, the matrix is formed, in one pass, and decomposed.

    Args:
        model: any network that can be differentiated twice; run in eval mode and left as it was.
        likelihood: "classification", "regression", "binary" or a `Likelihood`.
        data: batches that can be iterated again and again, the same examples each time, see `CurvatureProducts`.
        rank: how many eigenpairs at most. There are no more than weights; those with eigenvalues indistinguishable from zero are omitted.
        curvature: "ggn", "ggn_mc", "ggn_mc_rademacher" or "ef".
        mc_samples: random columns per example, for "ggn_mc" and "ggn_mc_rademacher".
        generator: source of the labels or signs; by default a separate one, which `torch.manual_seed` makes reproducible.
        keys: keys of batches that are mappings.
        parameters: those that are covered, by name; by default all that require grad.
        progress_bar: show the progress of the products, on a terminal.

    Raises:
        InvalidBatchError: the data do not fit the model or the likelihood, or they differ from one pass to another.
        UnsupportedParameterError: the gradients of the model cannot be differentiated, there are none, or the forward pass is random
            or mixes the examples of a batch.
    """
    rank = whole_number("the rank of a low-rank curvature", rank, least=1)
    products = CurvatureProducts(
        model,
        likelihood,
        data,
        curvature=curvature,
        mc_samples=mc_samples,
        generator=generator,
        keys=keys,
        parameters=parameters,
    )
    hidden = not (progress_bar and sys.stderr.isatty())
    with tqdm(desc="Lanczos", unit="product", disable=hidden) as bar:

        def multiply(vectors: Tensor) -> Tensor:
            bar.update()
            return products.product(vectors)

        values, vectors = _leading_eigenpairs(multiply, rank, products)
    totals = products.totals
    assert totals is not None  # there was at least one product
    H = LowRank(products.shapes, vectors, values)
    check_finite_curvature(H)
    return LowRankFit(H, totals, products.n_products)


def _leading_eigenpairs(
    multiply: Multiply, rank: int, products: CurvatureProducts
) -> tuple[Float[Tensor, " k"], Float[Tensor, "P k"]]:
    n_basis = max(2 * rank + 1, 20)
    if n_basis >= products.n_params:
        identity = torch.eye(products.n_params, dtype=products.dtype, device=products.device)
        matrix = multiply(identity).double()
        values, vectors = scipy.linalg.eigh(((matrix + matrix.mT) / 2).cpu().numpy())
    else:
        values, vectors = _lanczos(multiply, rank, n_basis, products)
    largest_first = values.argsort()[::-1][:rank]
    is_kept = values[largest_first] > _ROUNDING * torch.finfo(products.dtype).eps * values.max(initial=0)
    chosen = largest_first[is_kept]
    vectors = torch.from_numpy(vectors[:, chosen].copy()).to(products.device, products.dtype)
    return torch.from_numpy(values[chosen].astype(np.float64)).to(products.device), vectors


def _lanczos(multiply: Multiply, rank: int, n_basis: int, products: CurvatureProducts) -> tuple[np.ndarray, np.ndarray]:
    """The leading eigenpairs, with residuals of at most √ε times the eigenvalue: eigenvalues converge twice as fast."""
    P = products.n_params
    noise = torch.randn(1, P, dtype=products.dtype, generator=torch.Generator().manual_seed(0))
    start = multiply(noise.to(products.device)).cpu().numpy()[0]  # in the range of H
    if not start.any():
        return np.zeros(0), np.zeros((P, 0))

    def product(vector: np.ndarray) -> np.ndarray:
        row = torch.from_numpy(vector.reshape(1, P)).to(products.device)
        return multiply(row).cpu().numpy()[0]

    operator = LinearOperator((P, P), matvec=product, dtype=start.dtype)  # type: ignore[call-arg]
    tolerance = float(np.finfo(start.dtype).eps) ** 0.5
    try:
        values, vectors = eigsh(operator, rank, which="LA", ncv=n_basis, v0=start, maxiter=_N_RESTARTS, tol=tolerance)  # pyright: ignore
    except ArpackNoConvergence as error:
        raise RuntimeError(
            f"{len(error.eigenvalues)} of {rank} eigenpairs were found in {products.n_products} passes over the data, as the next ones are "
            "too close to each other; ask for another rank."
        ) from error
    return values, vectors
