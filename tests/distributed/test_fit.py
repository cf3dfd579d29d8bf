"""Fits by several processes equal those of one."""

import pytest
import torch
from groups import run_on
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from laplace_ws import Laplace

N = 23


def make_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4))
    return net.double()


def make_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 1, 6, 6, dtype=torch.float64, generator=generator)
    return TensorDataset(x, torch.randint(0, 4, (N,), generator=generator))


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


@pytest.mark.parametrize("n", [2, 3, 4])
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
