"""Models and data that are spread over several processes are refused, rather than counted in part."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from laplace_ws import InvalidBatchError, Laplace, UnsupportedParameterError, kron_factors, marglik_training
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
def test_shares_of_the_data_are_refused_by_every_pass(name):
    model, loader = net(), LOADERS[name]()
    la = Laplace(model, "classification")
    la.fit([(X, Y)])
    n_data = la.n_data
    for run in (
        lambda: la.fit(loader),
        lambda: la.fit(loader, override=False),
        lambda: la.optimize_prior_precision("gridsearch", val_loader=loader),
        lambda: la.optimize_prior_precision("gradient", val_loader=loader),
        lambda: Laplace(model, "classification", hessian_structure="lowrank").fit(loader),
        lambda: Laplace(model, "classification", hessian_structure="ekfac").fit(loader),
        lambda: kron_factors(model, "classification", loader),
        lambda: marglik_training(model, loader, **SMALL),
        lambda: prepare(model, loader, "classification", Schedule(), TrainingOptions()),
    ):
        with pytest.raises(
            InvalidBatchError,
            match=r"gives one of [23] processes its share of the data \((Distr|Shard).*give a loader of",
        ):
            run()
    assert la.n_data == n_data == 12


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


def one_of_two(rank: int, store: str, said) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    data = TensorDataset(X, Y)
    model = net()
    wrapped = nn.parallel.DistributedDataParallel(net())
    sharded = fully_shard(net(), mesh=init_device_mesh("cpu", (2,)))
    loader, share = DataLoader(data, batch_size=4), DataLoader(data, batch_size=3, sampler=DistributedSampler(data))
    la = Laplace(model, "classification")
    refusals = [
        refusal(lambda: Laplace(wrapped, "classification")),
        refusal(lambda: marglik_training(wrapped, share, **SMALL)),
        refusal(lambda: Laplace(sharded, "classification")),
        refusal(lambda: la.fit(share)),
        refusal(lambda: la.fit(loader)),
        refusal(lambda: marglik_training(model, loader, **SMALL)),
    ]
    dist.destroy_process_group()
    la.fit(loader)
    said.put((refusals, la.n_data))


@pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or "fork" not in multiprocessing.get_all_start_methods(),
    reason="needs gloo and fork",
)
def test_two_processes(tmp_path):
    context = multiprocessing.get_context("fork")  # which has no need to import torch again
    said = context.Queue()
    processes = [context.Process(target=one_of_two, args=(rank, str(tmp_path / "store"), said)) for rank in range(2)]
    for process in processes:
        process.start()
    found = [said.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=120)
    for refusals, n_data in found:
        wrapped, trained, sharded, share, whole, training = refusals
        assert wrapped.startswith("UnsupportedParameterError the model is run by DistributedDataParallel")
        assert trained == wrapped
        assert sharded.startswith("UnsupportedParameterError the model is run by FSDPModule")
        assert share.startswith(
            "InvalidBatchError the loader gives one of 2 processes its share of the data (DistributedSampler)"
        )
        assert whole.startswith("InvalidBatchError torch.distributed runs 2 processes")
        assert training == whole
        assert n_data == 12
