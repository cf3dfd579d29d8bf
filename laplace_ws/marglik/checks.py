"""What is checked before the first gradient step, so that no training is lost to bad input."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laplace_ws.curvature.backend import check_devices, check_outputs, evaluation_mode
from laplace_ws.errors import InvalidBatchError
from laplace_ws.likelihoods import Likelihood


@dataclass(frozen=True)
class DataFacts:
    """What one pass over a loader tells.

    Attributes:
        n_data: number of examples N, also of those that `drop_last` leaves out where the loader knows them (`n_data`).
        n_batches: batches an epoch.
        x_first: inputs of one batch.
    """

    n_data: int
    n_batches: int
    x_first: Tensor


def check_data(model: nn.Module, loader: Iterable[Any], likelihood: Likelihood) -> DataFacts:
    """Go through the data once; the model runs on the first batch only, all targets are held against its outputs.

    Raises:
        InvalidBatchError: no batch, a batch that is no pair, data on another device than the model, outputs or targets
            that do not fit the likelihood.
    """
    n_data, n_batches = 0, 0
    x_first = row = torch.empty(0)
    for batch in loader:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise InvalidBatchError(
                f"the loader must give pairs (x, y), but batch {n_batches} is a {type(batch).__name__}"
            )
        x, y = batch
        check_devices(model, x, y)
        if n_batches == 0:
            x_first, row = x, first_output(model, x, y, likelihood)
        if y.shape[1:] == row.shape[1 : y.ndim]:
            likelihood.check(row.expand(len(y), *row.shape[1:]), y)
        n_data += len(y)
        n_batches += 1
    if n_batches == 0:
        raise InvalidBatchError(
            "the loader gives no batch: is the data set empty, or smaller than a batch with drop_last?"
        )
    return DataFacts(int(getattr(loader, "n_data", n_data)), n_batches, x_first)


def first_output(model: nn.Module, x: Tensor, y: Tensor, likelihood: Likelihood) -> Tensor:
    """The model's output for the first example, [1, ...], after checking those of its batch."""
    with evaluation_mode(model), torch.no_grad():
        f = check_outputs(model(x), len(x))
    likelihood.check(f, y)
    return f[:1]
