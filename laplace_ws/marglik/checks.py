"""Checks before the first gradient step, so that no training is lost to bad input."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from laplace_ws.curvature.backend import evaluation_mode
from laplace_ws.curvature.batches import Batches, Data
from laplace_ws.curvature.inputs import DEFAULT_KEYS, BatchKeys, ModelInputs, call_model
from laplace_ws.curvature.watch import DataWatch, draws_with_replacement
from laplace_ws.errors import InvalidBatchError
from laplace_ws.likelihoods import Likelihood
from laplace_ws.values import whole_number


@dataclass(frozen=True)
class DataFacts:
    """What one pass over a loader reveals.

    Attributes:
        n_data: number of examples N: as given, or counted, with those that `drop_last` leaves out where the loader knows them.
        n_batches: batches per epoch.
        x_first: inputs of one batch.
        output_ndim: number of dimensions of its outputs.
    """

    n_data: int
    n_batches: int
    x_first: ModelInputs
    output_ndim: int


def check_data(
    model: nn.Module,
    loader: Data,
    likelihood: Likelihood,
    keys: BatchKeys = DEFAULT_KEYS,
    n_data: int | None = None,
) -> DataFacts:
    """Go through the data once; the model runs on the first batch only, and all targets are checked against its outputs.

    Raises:
        InvalidBatchError: no batch, a batch of a form that `split_batch` does not know, a loader that can be iterated only once, data
            on another device than the model, outputs or targets that do not fit the likelihood.
        ValueError: `n_data` is less than 1.
    """
    if n_data is not None and whole_number("n_data", n_data) < 1:
        raise ValueError(f"n_data={n_data} must be at least 1")
    if isinstance(loader, Generator):  # at once, as it may never end
        raise one_pass_error(loader)
    n_seen, n_batches = 0, 0
    x_first: ModelInputs = torch.empty(0)
    row = torch.empty(0)
    watch = DataWatch(likelihood)
    batches = Batches.of(loader, model, keys)
    with batches.processes.together("the first pass over the data"):
        n_empty = 0

        def count_empty() -> None:
            nonlocal n_empty
            n_empty += 1

        for x, y in replace(batches, on_empty=count_empty):
            watch(x, y)
            if n_batches == 0:
                x_first, row = x, first_output(model, x, y, likelihood)
            if y.shape[1:] == row.shape[1 : y.ndim]:
                likelihood.check(row.expand(len(y), *row.shape[1:]), y)
            n_seen += len(x)
            n_batches += 1
        n_seen, n_batches = _of_all(batches, n_seen, n_batches, n_batches + n_empty)
    if n_batches == 0:
        raise InvalidBatchError(
            "the loader gives no batch: is the data set empty, or smaller than a batch with drop_last?"
        )
    # Some loaders are their own iterator and begin anew at each `iter`; only a second pass tells them from the others.
    if isinstance(loader, Iterator) and sum(1 for _ in loader) == 0:
        raise one_pass_error(loader)
    watch.warn(repeats=not draws_with_replacement(loader), stacklevel=4)
    if n_data is None:
        n_data = n_examples(loader, n_seen) if batches.shard is None else batches.shard.n_examples(loader, n_seen)
    return DataFacts(n_data, n_batches, x_first, row.ndim)


def _of_all(batches: Batches, n_seen: int, n_own: int, n_batches: int) -> tuple[int, int]:
    """Examples that all processes have seen, and batches, of which each has as many.

    Raises:
        InvalidBatchError: a process has no example, or another number of batches.
    """
    if batches.shard is None:
        return n_seen, n_batches
    processes = batches.processes
    if not n_own:
        raise InvalidBatchError(
            f"process {processes.rank} of {processes.size} has no example; give each at least one, or start fewer processes."
        )
    numbers = processes.gather((n_seen, n_batches))
    for rank, (_, n) in enumerate(numbers):
        if n != numbers[0][1]:
            raise InvalidBatchError(
                f"process {rank} has {n} batches and process 0 has {numbers[0][1]}; give all processes the same data and batch size."
            )
    return sum(n for n, _ in numbers), n_batches


def check_comparable(tuned: Collection[str], *, averages: bool) -> None:
    """Refuse keep="best" where the log marginal likelihoods of two tunings do not compare.

    Args:
        tuned: names of the hyperparameters that are.
        averages: whether tunings take the curvature that the optimiser has averaged.

    Raises:
        ValueError: says why they do not.
    """
    if "temperature" in tuned:
        raise ValueError(
            "keep='best' compares log marginal likelihoods, which rise with the temperature whatever the network; take keep='last' with "
            "tune_temperature"
        )
    if averages:
        raise ValueError(
            "keep='best' compares log marginal likelihoods, and those by an optimiser's averages lag behind the weights; take "
            "keep='last', or refit=True"
        )


def one_pass_error(loader: Iterable[Any]) -> InvalidBatchError:
    """The error for a loader that is used up after one pass."""
    return InvalidBatchError(
        f"the loader, a {type(loader).__name__}, can be iterated only once; pass the loader itself, "
        "or a list of the batches"
    )


def n_examples(loader: Iterable[Any], n_seen: int) -> int:
    """Number of examples N of a loader that gave `n_seen` in one pass."""
    n_data = getattr(loader, "n_data", None)
    if n_data is not None:
        return int(n_data)
    batch_sampler = getattr(loader, "batch_sampler", None)
    if not getattr(batch_sampler, "drop_last", False):
        return n_seen
    # The sampler first, as it may leave examples of the data set out; that of an iterable data set has no length.
    counted = (getattr(batch_sampler, "sampler", None), getattr(loader, "dataset", None))
    return next((len(source) for source in counted if isinstance(source, Sized)), n_seen)


def first_output(model: nn.Module, x: ModelInputs, y: Tensor, likelihood: Likelihood) -> Tensor:
    """The model's output for the first example, [1, ...], after checking those of its batch."""
    with evaluation_mode(model), torch.no_grad():
        f = call_model(model, x)
    likelihood.check(f, y)
    return f[:1]
