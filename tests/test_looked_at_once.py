"""What is the same from pass to pass is looked at once: batches, the check against autograd, the state of the model."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from cases import double
from torch import nn

from laplace_ws import InvalidBatchError, Laplace, UnsupportedParameterError, marglik_training
from laplace_ws.curvature import batches, checks, inputs
from laplace_ws.posterior import fingerprint


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """Counts of calls, by name of the function."""
    counts = dict.fromkeys(("split_batch", "as_inputs", "check_linearisation", "tensor_sums"), 0)

    def count(module, name):
        real = getattr(module, name)

        def counted(*args, **kwargs):
            counts[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    count(batches, "split_batch")
    count(inputs, "as_inputs")
    count(checks, "check_linearisation")
    count(fingerprint, "tensor_sums")
    return counts


def network() -> nn.Module:
    return double(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)))


def data(n_batches: int = 4):
    return [(torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 3) for _ in range(n_batches)]


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_a_training_splits_each_batch_once_and_is_checked_once(calls, structure):
    """Four epochs of four batches: one pass of checks, four epochs, four fits, one last fit."""
    marglik_training(
        network(),
        data(),
        hessian_structure=structure,
        n_epochs=4,
        n_epochs_burnin=0,
        marglik_frequency=1,
        fit_fraction=1.0,
        n_hypersteps=2,
    )
    visits = 4 * (1 + 4 + 4 + 1)
    assert calls["split_batch"] == calls["as_inputs"] == visits
    assert calls["check_linearisation"] == 1


def test_predictions_are_checked_and_fingerprinted_only_after_a_change(calls):
    model, train = network(), data()
    la = Laplace(model, "classification", ["3"])
    la.fit(train)
    assert (calls["check_linearisation"], calls["tensor_sums"]) == (1, 1)
    la(train[0][0])
    assert (calls["check_linearisation"], calls["tensor_sums"]) == (1, 2)
    for _ in range(3):
        la(train[0][0])
    assert (calls["check_linearisation"], calls["tensor_sums"]) == (1, 2)
    with torch.no_grad():
        model[0].weight.mul_(1)  # written, though to the same values
    la(train[0][0])
    assert calls["tensor_sums"] == 3


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("layer", ["0", "1", "3"])
def test_a_change_of_the_model_is_seen_however_it_is_written(layer, through_data):
    """Also through `.data`, whose writes torch does not count, and in what was read a moment before."""
    model, (x, _) = network(), data(1)[0]
    la = Laplace(model, "classification", ["3"])
    la.fit(data())
    la(x)
    tensor = model.get_submodule(layer).weight
    with torch.no_grad():
        (tensor.data if through_data else tensor).add_(0.1)
    with pytest.raises(ValueError, match=r"in the fit|of the fit"):
        la(x)
    with torch.no_grad():
        tensor.sub_(0.1)
    la(x)


def test_a_module_that_is_put_in_later_is_checked(calls):
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return g * w, (g * x).sum()

    class Scaled(nn.Module):
        """Of the calls that a backend sees the same as before: another one is hidden from it."""

        is_hidden = False

        def __init__(self):
            super().__init__()
            self.inner, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(()))

        def forward(self, x):
            y = self.inner(x) * self.scale
            return Hidden.apply(y, self.scale) if self.is_hidden else y

    model, train = Scaled().double(), data()
    la = Laplace(model, "classification")
    for _ in range(2):
        la.fit(train, recheck=False)
    assert calls["check_linearisation"] == 1
    model.is_hidden = True
    with pytest.raises(UnsupportedParameterError, match="'scale' is used by mul, but not by that alone"):
        la.fit(train, recheck=False)
    model.is_hidden = False
    la.fit(train, recheck=False)
    model.inner = nn.Linear(3, 3).double()
    before = calls["check_linearisation"]
    la.fit(train, recheck=False)
    assert calls["check_linearisation"] == before + 1
    la.fit(train)
    assert calls["check_linearisation"] == before + 2


def centred(module, arguments):
    return (arguments[0] - arguments[0].mean(0),)


def mix_by_hook(model):
    model[3].register_forward_pre_hook(centred)


def mix_by_function(model):
    model.between = lambda x: x - x.mean(0)


def mix_by_statistics(model):
    model[1].running_mean = model[1].running_var = None


class WithFunction(nn.Sequential):
    """A network that calls a function which is its attribute."""

    def __init__(self, *modules):
        super().__init__(*modules)
        self.between = torch.tanh

    def forward(self, x):
        return self[3](self.between(self[1](self[0](x))))


@pytest.mark.parametrize("change", [mix_by_hook, mix_by_function, mix_by_statistics])
@pytest.mark.parametrize("then", ["predict", "fit"])
def test_what_mixes_examples_later_is_refused(change, then):
    model, train = double(WithFunction(*network())), data()
    la = Laplace(model, "classification")
    la.fit(train)
    change(model)
    with pytest.raises(
        (UnsupportedParameterError, ValueError),
        match=r"not grouped by example|than in the fit|tie the examples together|computes another function",
    ):
        la(train[0][0]) if then == "predict" else la.fit(train, recheck=False)


@pytest.mark.parametrize(
    "width", [4, 40_000]
)  # a small tensor, and one of which a part would be looked at if it were frozen
def test_one_covered_weight_that_is_written_past_torch_is_seen(width):
    model, train = double(nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 3))), data()
    la = Laplace(model, "classification", hessian_structure="diag")
    la.fit(train)
    la(train[0][0])
    model[0].weight.data[1, 2] += 1
    with pytest.raises(ValueError, match=r"'0\.weight' differs by up to 1"):
        la(train[0][0])


def test_larger_images_are_taken_in_parts_though_small_ones_were_fitted():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    la = Laplace(model, "classification", memory_budget=2**22)
    la.fit([(torch.randn(8, 1, 8, 8), torch.arange(8) % 3)])
    sizes = []
    model.register_forward_hook(lambda module, x, f: sizes.append(len(f)))
    la(torch.randn(40, 1, 64, 64))
    assert max(sizes) < 40


def test_predictions_that_are_not_finite_are_refused():
    model, train = network(), data()
    la = Laplace(model, "classification")
    la.fit(train)
    with pytest.raises(InvalidBatchError, match="outputs that are not finite"):
        la(train[0][0] * torch.nan)


def test_an_old_fit_is_let_go():
    model, train = network(), data()
    la = Laplace(model, "classification", hessian_structure="full")
    la.fit(train)
    la(train[0][0])
    old = weakref.ref(la.H)
    la.fit(train)
    gc.collect()
    assert old() is None
