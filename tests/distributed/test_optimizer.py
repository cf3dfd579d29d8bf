"""K-FAC by several processes takes the steps of one."""

import pytest
import torch
import torch.nn.functional as F
from distributed_case import make_data, make_net
from groups import run_on
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from laplace_ws.optim import KFAC


def trained(n: int, approx: str, curvature: str):
    """Weights and factors after nine steps on batches of 12 over all processes."""
    x, y = make_data().tensors
    data = TensorDataset(x[:12], y[:12])
    net = make_net()
    model = nn.parallel.DistributedDataParallel(net) if n > 1 else net
    sampler = DistributedSampler(data, shuffle=False) if n > 1 else None
    loader = DataLoader(data, batch_size=12 // n, sampler=sampler)
    options = {"kfac_approx": approx, "curvature": curvature, "generator": torch.Generator().manual_seed(3)}
    if curvature != "ef":
        options["likelihood"] = "classification"
    optimizer = KFAC(model, lr=0.02, start_steps=3, factor_update_steps=2, inv_update_steps=4, **options)
    for _ in range(9):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    return weights, optimizer.kron(12).to_dense(), optimizer.n_steps


@pytest.mark.parametrize(
    ("approx", "curvature"), [("expand", "ef"), ("reduce", "ef"), ("expand", "ggn_mc"), ("reduce", "ggn_mc_rademacher")]
)
def test_steps_equal_those_of_one_process(approx, curvature):
    alone = trained(1, approx, curvature)
    for found in run_on(2, trained, 2, approx, curvature):
        if isinstance(found, Exception):
            raise found
        torch.testing.assert_close(found[0], alone[0], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found[1], alone[1], rtol=1e-9, atol=1e-11)
        assert found[2] == alone[2]
