"""What one pass over the data tells, and which loaders are refused."""

from __future__ import annotations

import math

import pytest
from marglik.runs import QUICK, SGD, blobs, mlp
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from laplace_ws.data import TensorLoader
from laplace_ws.errors import InvalidBatchError
from laplace_ws.likelihoods import make_likelihood
from laplace_ws.marglik import marglik_training
from laplace_ws.marglik.checks import check_data


def data_loader(**options) -> DataLoader:
    return DataLoader(TensorDataset(*blobs().dataset.tensors), batch_size=16, **options)


@pytest.mark.parametrize("shuffle", [False, True])
def test_n_counts_what_drop_last_leaves_out_in_either_loader(shuffle):
    x, y = blobs().dataset.tensors
    loaders = [
        TensorLoader(x, y, batch_size=16, shuffle=shuffle, drop_last=True),
        data_loader(shuffle=shuffle, drop_last=True),
    ]
    for loader in loaders:
        facts = check_data(mlp(), loader, make_likelihood("classification"))
        assert (facts.n_data, facts.n_batches) == (60, 3)


def test_n_is_counted_where_the_sampler_has_no_length():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(TensorDataset(*blobs().dataset.tensors))

    facts = check_data(mlp(), DataLoader(Stream(), batch_size=16, drop_last=True), make_likelihood("classification"))
    assert facts.n_data == 48


def batch_by_batch():
    yield from blobs()


@pytest.mark.parametrize(
    "make",
    [batch_by_batch, lambda: iter(list(blobs())), lambda: iter(data_loader())],
    ids=["generator", "iterator of a list", "iterator of a data loader"],
)
def test_a_loader_for_one_pass_is_refused_before_training(make):
    with pytest.raises(InvalidBatchError, match="can be iterated only once; pass the loader itself"):
        check_data(mlp(), make(), make_likelihood("classification"))


def test_an_endless_generator_is_refused_at_once():
    def endless():
        while True:
            yield from blobs()

    with pytest.raises(InvalidBatchError, match="only once"):
        marglik_training(mlp(), endless(), **QUICK, optimizer_kwargs=SGD)


class Rewinding:
    """Its own iterator, at the start again with each `iter`; from `last_pass` on it stays empty."""

    def __init__(self, last_pass: float = math.inf) -> None:
        self.n_passes, self.last_pass = 0, last_pass

    def __iter__(self):
        self.n_passes += 1
        self.rest = list(blobs()) if self.n_passes <= self.last_pass else []
        return self

    def __next__(self):
        if not self.rest:
            raise StopIteration
        return self.rest.pop()


def test_a_loader_that_begins_anew_at_each_pass_is_welcome():
    result = marglik_training(mlp(), Rewinding(), **QUICK, optimizer_kwargs=SGD)
    assert len(result.losses) == 6


def test_an_epoch_without_a_batch_is_an_error_of_the_loader():
    with pytest.raises(InvalidBatchError, match="can be iterated only once"):
        marglik_training(mlp(), Rewinding(last_pass=2), **QUICK, optimizer_kwargs=SGD)  # the passes of the checks
