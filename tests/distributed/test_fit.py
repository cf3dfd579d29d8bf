"""Fits by several processes equal those of one."""

import pytest
import torch
import torch.distributed as dist
from distributed_case import N, make_data, make_net, raised
from groups import run_on
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from laplace_ws import Laplace


def shared_loader(data: TensorDataset, batch_size: int, **options) -> DataLoader:
    return DataLoader(data, batch_size=batch_size, sampler=DistributedSampler(data, shuffle=False, **options))


def fitted(structure: str, curvature: str, batch_size: int, is_shared: bool = True, **options):
    data = make_data()
    loader = shared_loader(data, batch_size) if is_shared else DataLoader(data, batch_size=batch_size)
    la = Laplace(make_net(), "classification", hessian_structure=structure, curvature=curvature, prior_precision=2.0,
                 generator=torch.Generator().manual_seed(3), **options)  # fmt: skip
    la.fit(loader)
    return la.n_data, la.log_marginal_likelihood().item(), la.log_likelihood.item(), la.H.to_dense()


CASES = [
    ("kron", "ef", {"kfac_approx": "reduce"}),
    ("kron", "ggn", {"kfac_approx": "expand"}),
    ("kron", "ggn_mc", {"kfac_approx": "auto"}),
    ("kron", "ggn_mc_rademacher", {}),
    ("ekfac", "ggn", {}),
    ("ekfac", "ggn_mc", {}),
    ("diag", "ggn_mc", {}),
    ("full", "ef", {}),
    ("lowrank", "ggn", {"rank": 5}),
    ("kron", "ggn", {"subset_of_weights": "last_layer"}),
]


def body_of_cases(n: int):
    return [fitted(structure, curvature, 12 // n, **options) for structure, curvature, options in CASES]


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.long), pytest.param(4, marks=pytest.mark.long)])
def test_every_structure_and_curvature(n: int):
    of_processes = run_on(n, body_of_cases, n)
    for k, (structure, curvature, options) in enumerate(CASES):
        n_data, evidence, log_likelihood, H = fitted(structure, curvature, 12, is_shared=False, **options)
        for found in of_processes:
            if isinstance(found, Exception):
                raise found
            assert found[k][0] == n_data == N
            assert found[k][1] == pytest.approx(evidence, rel=1e-10)
            assert found[k][2] == pytest.approx(log_likelihood, rel=1e-12)
            torch.testing.assert_close(found[k][3], H, rtol=1e-10, atol=1e-12)
            assert torch.equal(found[k][3], of_processes[0][k][3])


def chosen(is_shared: bool, batch_size: int) -> list[torch.Tensor]:
    """Prior precisions and scale, chosen on validation data in each of the ways."""
    data, other = make_data(), make_data()
    other.tensors = (other.tensors[0] + 0.5, other.tensors[1])
    load = shared_loader if is_shared else DataLoader
    train, validation = load(data, batch_size=batch_size), load(other, batch_size=batch_size)
    la = Laplace(make_net(), "classification", prior_precision=2.0)
    la.fit(train)
    found = []
    for method in ("marglik", "gridsearch", "gradient"):
        data_options = {} if method == "marglik" else {"val_loader": validation}
        la.optimize_prior_precision(
            method, prior_structure="scalar" if method == "gridsearch" else "layerwise", **data_options
        )
        found.append(la.prior_precision.clone())
    return [*found, torch.tensor(la.optimize_covariance_scale(validation))]


def test_choices_on_validation_data():
    of_processes = run_on(2, chosen, True, 6)
    alone = chosen(False, 12)
    for found in of_processes:
        if isinstance(found, Exception):
            raise found
        for value, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


def refused(kind: str, rank: int):
    """What a process raises where one of them is given something bad."""
    data, net = make_data(), make_net()
    if dist.get_rank() == rank:
        x, y = data.tensors
        if kind == "nan":
            x = x.clone()
            x[rank] = float("nan")
        if kind == "labels":
            y = y + 9
        data = TensorDataset(x, y)
    la = Laplace(net, "classification", curvature="ggn_mc")
    return raised(lambda: la.fit(shared_loader(data, 6)))


@pytest.mark.parametrize("kind", ["nan", "labels"])
def test_a_process_that_fails_ends_the_fit_of_all(kind):
    found = run_on(3, refused, kind, 1)
    assert found[1].startswith("InvalidBatchError")
    for rank in (0, 2):
        assert found[rank].startswith("ProcessError: process 1 failed in a pass over the data: InvalidBatchError")


def fitted_to_few():
    x, y = make_data().tensors
    return raised(lambda: Laplace(make_net(), "classification").fit(shared_loader(TensorDataset(x[:2], y[:2]), 2)))


def test_a_process_without_an_example():
    found = run_on(3, fitted_to_few)
    assert (
        found[2]
        == "InvalidBatchError: process 2 of 3 has no example; give each at least one, or start fewer processes."
    )
    assert all("process 2 failed" in found[rank] for rank in (0, 1))


def fitted_with_another(what: str):
    is_other = what if dist.get_rank() else ""
    data = make_data()
    if is_other == "data":
        data.tensors = tuple(t[:15] for t in data.tensors)
    la = Laplace(
        make_net(seed=1 if is_other == "weights" else 0),
        "classification",
        curvature="ef" if is_other == "option" else "ggn",
    )
    return raised(lambda: la.fit(DataLoader(data, batch_size=6, sampler=DistributedSampler(data))))


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("option", "ValueError: curvature is 'ef' in process 1 and 'ggn' in process 0; start all processes alike."),
        ("data", "number of examples in the data set is 15 in process 1 and 23 in process 0"),
        ("weights", "ValueError: sum of '0.weight' is "),
    ],
)
def test_processes_that_differ_are_refused(what, says):
    for found in run_on(2, fitted_with_another, what):
        assert says in found
