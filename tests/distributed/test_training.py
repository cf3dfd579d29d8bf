"""Online training by several processes equals that by one."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_case import make_data, make_net, raised
from groups import run_on
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from laplace_ws import marglik_training

OPTIONS = {
    "n_epochs": 4, "n_epochs_burnin": 1, "marglik_frequency": 1, "n_hypersteps": 5, "progress_bar": False,
    "optimizer_kwargs": {"lr": 0.05, "momentum": 0.9},
}  # fmt: skip


def trained(n: int, path: Path | None = None, wrap: bool = False, net: nn.Module | None = None, **options):
    """What a training with batches of 12 over all processes gives; `n` of them, or the sampler of one process."""
    data = make_data()
    sampler = DistributedSampler(data, seed=3, **({} if n > 1 else {"num_replicas": 1, "rank": 0}))
    loader = DataLoader(data, batch_size=12 // n, sampler=sampler)
    torch.manual_seed(7)
    net = net or make_net()
    if next(net.parameters()).dtype == torch.float32:
        data.tensors = data.tensors[0].float(), data.tensors[1]
    model = nn.parallel.DistributedDataParallel(net) if wrap else net
    settings = {**OPTIONS, "fit_fraction": 1.0, **options}
    result = marglik_training(model, loader, checkpoint_path=path, resume=path is not None, **settings)
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    return {
        "weights": weights, "losses": torch.tensor(result.losses), "margliks": torch.tensor(result.margliks),
        "prior": torch.tensor(list(result.prior_precision.values())), "n_data": torch.tensor(result.la.n_data),
        "evidence": result.la.log_marginal_likelihood().detach(),
    }  # fmt: skip


def check_equal(of_processes, alone):
    for found in of_processes:
        if isinstance(found, Exception):
            raise found
        for name, value in alone.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
            )


CASES = {
    "defaults": {},
    "sampled labels, a part of the batches": {"curvature": "ggn_mc", "fit_fraction": 0.5},
    "accumulation and clipping": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "hessian_structure": "diag"},
    "newton and expand": {"hyper_optimizer": "newton", "kfac_approx": "expand", "final_curvature": "ef"},
}


def trained_in_each_way(n: int):
    return [trained(n, **options) for options in CASES.values()]


@pytest.mark.parametrize("n", [pytest.param(2, marks=pytest.mark.long), 3])
def test_training_equals_that_of_one_process(n: int):
    of_processes = run_on(n, trained_in_each_way, n)
    for found in of_processes:
        if isinstance(found, Exception):
            raise found
    for k, options in enumerate(CASES.values()):
        check_equal([found[k] for found in of_processes], trained(1, **options))


def trained_wrapped():
    return trained(2, wrap=True)


def test_a_model_in_distributed_data_parallel():
    check_equal(run_on(2, trained_wrapped), trained(1))


def trained_under_autocast(n: int):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return trained(n, max_grad_norm=0.5, gradient_accumulation_steps=2, net=make_net().float())


def test_bfloat16_under_autocast():
    first, second = run_on(2, trained_under_autocast, 2)
    check_equal([second], first)
    alone = trained_under_autocast(1)
    rounding = 8 * torch.finfo(torch.bfloat16).eps  # of some eight steps; half of the data would be off by a factor
    for name in ("losses", "weights", "evidence"):
        torch.testing.assert_close(first[name], alone[name], rtol=rounding, atol=rounding)


def cut_off(n: int, path: Path):
    """A training that ends after its second epoch."""

    def end(record):
        if record["epoch"] == 3:
            raise KeyboardInterrupt

    try:
        trained(n, path, on_epoch=end)
    except KeyboardInterrupt:
        return "interrupted"


def test_resumed_on_another_number_of_processes(tmp_path):
    whole = trained(1)
    for before, after in ((2, 3), (3, 1)):
        path = tmp_path / f"{before}.pt"
        assert run_on(before, cut_off, before, path) == ["interrupted"] * before
        if after == 1:
            check_equal([trained(1, path)], whole)
        else:
            check_equal(run_on(after, trained, after, path), whole)


def trained_with_a_budget():
    return trained(2, fit_fraction=None, marglik_frequency=None, curvature_budget=0.5)


def test_a_budget_is_kept_by_the_clock_of_the_first():
    first, second = run_on(2, trained_with_a_budget)
    check_equal([second], first)


def with_another(what: str):
    rank = dist.get_rank()
    options = {"lr_hyp": 0.2} if what == "option" and rank == 1 else {}
    data = make_data()
    if what == "data" and rank == 1:
        data.tensors = tuple(torch.cat([t] * 3) for t in data.tensors)
    torch.manual_seed(rank if what == "weights" else 0)
    net = make_net(seed=rank if what == "weights" else 0)
    loader = DataLoader(data, batch_size=6, sampler=DistributedSampler(data))
    return raised(lambda: marglik_training(net, loader, **OPTIONS, **options))


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("option", "lr_hyp is 0.2 in process 1 and 0.1 in process 0; start all processes alike."),
        ("data", "process 1 has 6 batches and process 0 has 2; give all processes the same data and batch size."),
        ("weights", "sum of '0.weight' is "),
    ],
)
def test_processes_that_differ_are_refused(what, says):
    for found in run_on(2, with_another, what):
        assert says in found


def diverges():
    data = make_data()
    loader = DataLoader(data, batch_size=6, sampler=DistributedSampler(data))
    options = {**OPTIONS, "optimizer_kwargs": {"lr": 1e12}, "n_hypersteps": 0}
    return raised(lambda: marglik_training(make_net(), loader, prior_prec_init=1.0, **options))


def test_a_training_that_diverges_ends_in_all():
    for found in run_on(2, diverges):
        assert found.startswith("TrainingDiverged")
        assert " became " in found


def dies():
    """The second process ends in the middle of a training."""
    import os

    def end(record):
        if record["epoch"] == 2 and dist.get_rank() == 1:
            os._exit(1)

    return raised(lambda: trained(2, on_epoch=end))


def test_a_process_that_dies_ends_the_training():
    first, second = run_on(2, dies)
    assert first.startswith("ProcessError: one of the 2 processes has ended or does not answer")
    assert isinstance(second, Exception)


def with_batch_norm():
    data = make_data()
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(48, 4)
    ).double()
    loader = DataLoader(data, batch_size=6, sampler=DistributedSampler(data))
    result = marglik_training(net, loader, **OPTIONS)
    state = torch.cat([t.double().flatten() for t in net.state_dict().values()])
    return state, result.la.log_marginal_likelihood().item()


def test_processes_stay_alike_with_batch_norm_and_dropout():
    (first, evidence), (second, other) = run_on(2, with_batch_norm)
    assert torch.equal(first, second)
    assert evidence == other
    assert math.isfinite(evidence)
