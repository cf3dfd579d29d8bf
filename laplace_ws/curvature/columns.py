"""Which curvature of the loss in the outputs is taken, and its columns."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.curvature.backend import Linearisation, columns_in_memory
from laplace_ws.kfac import Accumulator
from laplace_ws.likelihoods import Likelihood
from laplace_ws.registry import Choice


class Curvature(Choice):
    """Which curvature of the negative log likelihood is taken.

    `GGN`: all columns of the generalised Gauss-Newton matrix, exact. `GGN_MC`: gradients at labels drawn from the model's own predictive,
    unbiased. `GGN_MC_RADEMACHER`: the columns of the GGN summed with random signs, also unbiased, and of lower variance. `EF`: the
    empirical Fisher, gradients at the observed labels.
    """

    GGN = "ggn"
    GGN_MC = "ggn_mc"
    GGN_MC_RADEMACHER = "ggn_mc_rademacher"
    EF = "ef"

    @property
    def is_random(self) -> bool:
        """Whether its columns are drawn."""
        return self in (Curvature.GGN_MC, Curvature.GGN_MC_RADEMACHER)


def loss_columns(
    likelihood: Likelihood,
    curvature: Curvature,
    f: Float[Tensor, "N ..."],
    y: Tensor,
    *,
    mc_samples: int = 1,
    generator: torch.Generator | None = None,
) -> Iterator[Float[Tensor, "N ..."]]:
    """Columns s_c of a curvature Σ_c s_c s_cᵀ in the outputs of each example, without the terms that do not count.

    Args:
        likelihood: p(y | f).
        curvature: which columns.
        f: outputs.
        y: targets.
        mc_samples: random columns M per example, for `GGN_MC` and `GGN_MC_RADEMACHER`.
        generator: source of the labels or signs.
    """
    mask = likelihood.term_mask(f, y)
    for column in _of_all_terms(likelihood, curvature, f, y, mask, mc_samples, generator):
        if mask is None:
            yield column
        elif (masked := column * mask).any():
            yield masked


def _of_all_terms(
    likelihood: Likelihood,
    curvature: Curvature,
    f: Tensor,
    y: Tensor,
    mask: Tensor | None,
    mc_samples: int,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    if curvature is Curvature.GGN:
        # a likelihood whose terms all count need not know about masks
        yield from likelihood.hessian_columns(f) if mask is None else likelihood.hessian_columns(f, mask)
    elif curvature is Curvature.EF:
        yield likelihood.gradient_column(f, y)
    else:
        is_signed = curvature is Curvature.GGN_MC_RADEMACHER
        draw = likelihood.projected_column if is_signed else likelihood.sampled_column
        for _ in range(mc_samples):
            yield draw(f, generator) / mc_samples**0.5


def stream_columns(
    linearisation: Linearisation,
    columns: Iterator[Float[Tensor, "N ..."]],
    accumulator: Accumulator,
    *,
    keep_graph: bool = False,
) -> None:
    """Pull columns back, as many at once as memory allows, into an accumulator whose batch has started.

    Args:
        linearisation: of the batch.
        columns: in its outputs.
        accumulator: what they are added to.
        keep_graph: whether the graph is differentiated again afterwards.
    """
    f = linearisation.outputs
    in_memory = columns_in_memory(accumulator.column_bytes(len(f)), f.device)
    chunk = list(islice(columns, min(linearisation.columns_at_once, in_memory)))
    while chunk:
        next_chunk = list(islice(columns, min(linearisation.columns_at_once, in_memory)))
        is_last = not next_chunk and not keep_graph
        linearisation.stream(torch.stack(chunk), accumulator.add, is_last=is_last)
        chunk = next_chunk
