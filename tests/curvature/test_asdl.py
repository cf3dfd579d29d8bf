"""The ASDL backend beyond the conformance suite: what ASDL's hooks cannot see, and what they would leave behind."""

import warnings

import asdl
import pytest
import torch
from cases import CASES
from torch import nn

from laplace_ws import Laplace, UnsupportedParameterError, kron_factors

DATA = [(torch.randn(4, 3), torch.randn(4, 2))]


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def first_and_unused(net, x):
    net.a(x * 2)
    return net.b(torch.tanh(net.a(x)))


UNSEEN = {
    "a call that does not reach the output": (
        first_and_unused,
        r"'a' is called 2 times, but only 1 of the calls reach the",
    ),
    "input by keyword": (lambda net, x: net.b(net.a(input=x)), r"'a' is called with its input by keyword"),
    "not called": (lambda net, x: net.b(x), r"'a.weight' requires grad but has no gradient \(it is not used"),
    "weight used without its module": (
        lambda net, x: net.b(net.a(x) @ net.a.weight),
        r"'a.weight' is used by Linear, but not by that alone",
    ),
    "input changed in place": (
        lambda net, x: (net.b(h := net.a(x) * 1), h.add_(1))[0],
        r"an input of Linear was changed in place after the call",
    ),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_hooks_cannot_see_is_named(name):
    forward, message = UNSEEN[name]
    with pytest.raises(UnsupportedParameterError, match=message):
        Laplace(Net(forward), "regression", backend="asdl").fit(DATA)


def test_a_module_whose_output_is_not_used_has_zero_curvature():
    model = Net(lambda net, x: (net.a(x), net.b(x))[1])
    native, other = (kron_factors(model, "regression", DATA, backend=name) for name in ("native", "asdl"))
    assert other["a.weight"].B.count_nonzero() == 0
    torch.testing.assert_close(other.to_dense(), native.to_dense())


def test_a_full_backward_hook_is_named():
    model = Net(lambda net, x: net.b(net.a(x)))
    handle = model.b.register_full_backward_hook(lambda *_: None)
    with pytest.raises(UnsupportedParameterError, match=r"'b.weight' belongs to a Linear with a full backward hook"):
        kron_factors(model, "regression", DATA, backend="asdl")
    handle.remove()
    model.b._is_full_backward_hook = None
    kron_factors(model, "regression", DATA, backend="asdl")


def test_batch_statistics_are_named():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False))
    with pytest.raises(
        UnsupportedParameterError, match=r"'1.weight' is used by BatchNorm1d, with statistics of the batch"
    ):
        kron_factors(model, "regression", DATA, backend="asdl")


def test_asdl_itself_works_on_the_model_before_and_after():
    """Its marks on parameters and modules are its own: they are neither taken away nor needed."""
    model, x, y = next(c for c in CASES if c.name == "cnn").make()
    config = asdl.FisherConfig("fisher_emp", ["kron"], loss_type="cross_entropy", data_size=1)

    def stock():
        maker = asdl.get_fisher_maker(model, config)
        dummy = maker.setup_model_call(model, x)
        maker.setup_loss_call(torch.nn.functional.cross_entropy, dummy, y)
        maker.forward_and_backward()
        return model[0].fisher.kron.A.clone()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.eval()
        before, marks = stock(), [vars(p).copy() for p in model.parameters()]
        kron_factors(model, "classification", [(x, y)], backend="asdl")
        assert [vars(p) for p in model.parameters()] == marks
        torch.testing.assert_close(model[0].fisher.kron.A, before)
        torch.testing.assert_close(stock(), before)


def test_no_warning_reaches_the_user():
    model, x, y = next(c for c in CASES if c.name == "vision-transformer").make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kron_factors(model, "classification", [(x, y)], backend="asdl")
