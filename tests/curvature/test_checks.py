"""What a backend cannot see, or would take for something else, is noticed before it is believed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from laplace_ws import Laplace, UnsupportedParameterError, kron_factors


class Hidden(torch.autograd.Function):
    """A linear map that no function mode sees into."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x.mm(w.t())

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g.mm(w), g.t().mm(x)


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.w, self.p = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(1, 3))
        self._forward = forward

    def forward(self, x):
        return self._forward(self, F.linear(x, self.w) + self.p)


def in_place_on_a_view(net, y):
    y = y * 1
    y.view(-1, 3)[:, :3].add_(net.p)
    return y


def mixed_with_the_next_but_one(net, y):
    return y + y.roll(2, 0)


HIDDEN = {
    "custom function": (lambda net, y: Hidden.apply(y, net.w), "'w' is used by linear, but not by that alone"),
    "in place on a view": (in_place_on_a_view, "'p' is used by add, add_, but not by that alone"),
    "mixed examples": (mixed_with_the_next_but_one, "rows that are not grouped by example"),
    "centred and mixed": (
        lambda net, y: (z := y - y.mean(-1, keepdim=True)) + z.roll(1, 0),
        "rows that are not grouped by example",
    ),
    "detached": (lambda net, y: y.detach(), "the outputs of Net do not depend on any parameter that requires grad"),
    "random": (lambda net, y: F.dropout(y, 0.5, training=True), "gives other outputs for the same inputs"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_uses_and_mixed_examples_are_refused(name):
    forward, message = HIDDEN[name]
    model, x, y = Net(forward).double(), torch.randn(6, 3).double(), torch.randn(6, 3).double()
    rng = torch.get_rng_state()
    for take in (lambda: Laplace(model, "regression").check(x), lambda: kron_factors(model, "regression", [(x, y)])):
        with pytest.raises(UnsupportedParameterError, match=message):
            take()
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_first_batch_of_one_example_does_not_pass_for_a_check():
    model = Net(mixed_with_the_next_but_one)
    data = [(torch.randn(1, 3), torch.randn(1, 3)), (torch.randn(4, 3), torch.randn(4, 3))]
    with pytest.raises(UnsupportedParameterError, match="not grouped by example"):
        kron_factors(model, "regression", data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_checks_pass_an_honest_network_in_every_precision(dtype):
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)).to(dtype)
    Laplace(model, "classification").check(torch.randn(7, 2, 6, 6).to(dtype))


def test_inference_mode_is_refused_and_no_grad_is_not():
    model, data = nn.Linear(3, 2), [(torch.randn(4, 3), torch.randn(4, 2))]
    with torch.no_grad():
        inside = kron_factors(model, "regression", data)
    torch.testing.assert_close(inside.to_dense(), kron_factors(model, "regression", data).to_dense())
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"leave it, or use torch\.no_grad"):
        kron_factors(model, "regression", data)


def test_a_train_method_of_the_module_is_called():
    class Merging(nn.Linear):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merging(3, 2), nn.Dropout())
    model[1].eval()
    kron_factors(model, "regression", [(torch.randn(4, 3), torch.randn(4, 2))])
    assert (model.training, model[0].training, model[0].merged, model[1].training) == (True, True, False, False)
