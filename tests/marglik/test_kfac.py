"""Online training by K-FAC."""

import pytest
import torch
from marglik.runs import QUICK, blobs, mlp
from marglik.test_checkpoint import Stop, stop_after

from laplace_ws import marglik_training
from laplace_ws.optim import KFAC

OPTIONS = {
    "optimizer_cls": KFAC,
    "optimizer_kwargs": {"lr": 0.01, "factor_update_steps": 2, "inv_update_steps": 3, "start_steps": 2},
}


def train(**options):
    torch.manual_seed(0)
    return marglik_training(mlp(), blobs(), **QUICK | OPTIONS | options)


def test_kfac_trains_and_the_hyperparameters_are_tuned():
    result = train()
    assert result.losses[-1] < result.losses[0]
    assert len(result.margliks) > 0
    assert not any(module._forward_pre_hooks for module in result.model.modules())  # nothing is recorded any more


def test_resumed_equals_uninterrupted(tmp_path):
    path = tmp_path / "c.pt"
    whole = train()
    with pytest.raises(Stop):
        train(checkpoint_path=path, on_epoch=stop_after(3))
    resumed = train(checkpoint_path=path, resume=True)
    assert resumed.losses == whole.losses
    assert resumed.margliks == whole.margliks


def test_weight_decay_is_refused():
    with pytest.raises(ValueError, match=r"KFAC has weight_decay=0\.1, but the prior is the weight decay"):
        train(optimizer_kwargs={"weight_decay": 0.1})
