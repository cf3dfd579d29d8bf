"""Models and data that are spread over several processes are refused, rather than counted in part."""

import warnings

import pytest
import torch
from groups import run_on
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from laplace_ws import DataWarning, Laplace, UnsupportedParameterError, kron_factors, marglik_training
from laplace_ws.curvature import jacobians
from laplace_ws.marglik import Schedule, TrainingOptions, prepare

X, Y = torch.randn(12, 4), torch.arange(12) % 3
SMALL = {"n_epochs": 1, "n_hypersteps": 0, "progress_bar": False}


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def shared(n: int, **options) -> DataLoader:
    data = TensorDataset(X, Y)
    return DataLoader(data, batch_size=4, sampler=DistributedSampler(data, n, 0, **options))


class Shard:
    """As accelerate's samplers name the number of processes."""

    num_processes = 2

    def __init__(self):
        self.batches = [[0, 1, 2, 3]]

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return 1


LOADERS = {
    "sampler": lambda: shared(2),
    "batch sampler": lambda: DataLoader(TensorDataset(X, Y), batch_sampler=Shard()),
    "sampler of a batch sampler": lambda: DataLoader(
        TensorDataset(X, Y), batch_sampler=torch.utils.data.BatchSampler(DistributedSampler(X, 3, 0), 4, False)
    ),
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_share_without_other_processes_is_counted_alone_with_a_warning(name):
    model, loader = net(), LOADERS[name]()
    share = sum(len(y) for _, y in loader)
    la = Laplace(model, "classification")
    for run in (
        lambda: la.fit(loader),
        lambda: la.optimize_prior_precision("gridsearch", val_loader=loader),
        lambda: kron_factors(model, "classification", loader),
        lambda: marglik_training(model, loader, **SMALL),
    ):
        with pytest.warns(
            DataWarning, match=r"one of [23] processes its share of the data \((Distr|Shard).*of the share alone"
        ):
            run()
    assert la.n_data == share < 12


def test_a_sampler_for_one_process_gives_all_of_the_data():
    model, options = net(), {"shuffle": False}
    la, plain = Laplace(model, "classification"), Laplace(model, "classification")
    la.fit(shared(1, **options))
    plain.fit(DataLoader(TensorDataset(X, Y), batch_size=4))
    assert la.n_data == 12
    assert torch.equal(la.H.to_dense(), plain.H.to_dense())
    marglik_training(model, shared(1, **options), **SMALL)


class FullyShardedDataParallel(nn.DataParallel):
    """Made without a GPU, as its namesake cannot be."""


@pytest.mark.parametrize("wrap", [nn.DataParallel, FullyShardedDataParallel])
def test_wrapped_models_are_refused_by_name(wrap):
    model = wrap(net())
    says = rf"the model is run by {wrap.__name__}, but .*; give the network that it wraps \(model.module\)"
    for run in (
        lambda: Laplace(model, "classification"),
        lambda: Laplace(model, "classification", "last_layer"),
        lambda: kron_factors(model, "classification", [(X, Y)]),
        lambda: jacobians(model, X),
        lambda: marglik_training(model, [(X, Y)], **SMALL),
        lambda: prepare(model, [(X, Y)], "classification", Schedule(), TrainingOptions()),
    ):
        with pytest.raises(UnsupportedParameterError, match=says):
            run()
    with pytest.raises(UnsupportedParameterError, match=r"'0' is run by"):
        Laplace(nn.Sequential(model, nn.Linear(3, 3)), "classification")
    Laplace(model.module, "classification").fit([(X, Y)])


def refusal(run) -> str:
    try:
        run()
    except ValueError as error:
        return f"{type(error).__name__} {error}"
    return "not refused"


def one_of_two():
    data = TensorDataset(X, Y)
    model = net()
    wrapped = nn.parallel.DistributedDataParallel(net())
    sharded = fully_shard(net(), mesh=init_device_mesh("cpu", (2,)))
    for_other = DistributedSampler(data, 2, 1 - torch.distributed.get_rank())
    whole, la = DataLoader(data, batch_size=4), Laplace(model, "classification")
    refusals = [
        refusal(lambda: Laplace(wrapped, "classification")),
        refusal(lambda: Laplace(sharded, "classification")),
        refusal(lambda: la.fit(DataLoader(data, batch_size=3, sampler=for_other))),
        refusal(lambda: la.fit(DataLoader(data, batch_sampler=Shard()))),
    ]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        la.fit(whole)
    return refusals, la.n_data, [str(w.message) for w in found if "torch.distributed" in str(w.message)]


def test_what_two_processes_are_refused_and_warned_of():
    for refusals, n_data, warned in run_on(2, one_of_two):
        wrapped, sharded, for_other, unknown = refusals
        assert wrapped.startswith("UnsupportedParameterError the model is run by DistributedDataParallel")
        assert sharded.startswith("UnsupportedParameterError the model is run by FSDPModule")
        assert for_other.startswith("InvalidBatchError the DistributedSampler divides the data among 2 processes, for")
        assert unknown.startswith("InvalidBatchError the Shard divides the data among 2 processes, for number None")
        assert n_data == 12
        assert "each process counts all that its own loader gives" in warned[0]
