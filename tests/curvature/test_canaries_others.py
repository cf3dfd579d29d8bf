"""What stock curvlinops and torch do today that the backends correct: a canary that dies tells which correction to revisit."""

from collections import Counter

import pytest
import torch
from curvature.canary_nets import LABELS, Twice, image_net, outer, reference
from curvlinops import KFACLinearOperator
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

# ---- curvlinops


def operator(model, params, x, kfac_approx="expand", loss=None, y=LABELS):
    """Dense K-FAC of `params`, the exact GGN of a sum over the data."""
    loss = loss or nn.CrossEntropyLoss(reduction="sum")
    op = KFACLinearOperator(
        model, loss, params, [(x, y)], fisher_type="type-2", kfac_approx=kfac_approx, check_deterministic=False
    )
    return op @ torch.eye(sum(p.numel() for p in params), dtype=x.dtype)


APPROX = ["expand", "reduce"]


def kfac(a, g, approx):
    a, g = (a, g) if approx == "expand" else (a.mean(1, keepdim=True), g.sum(2, keepdim=True))
    return torch.kron(outer(g), outer(a) / a.shape[:2].numel())


@pytest.mark.parametrize("approx", APPROX)
def test_curvlinops_is_the_design_on_a_plain_convolution(approx):
    """Both approximations are the project's: it is an oracle for Linear and for Conv2d with zero padding."""
    model, x = image_net(padding=1, stride=2)
    a, g = reference(model, model[0], x)
    torch.testing.assert_close(operator(model, [model[0].weight], x, approx), kfac(a, g, approx))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv1d(2, 2, 3), torch.zeros(4, 2, 5)),
        (nn.ConvTranspose2d(2, 2, 3), torch.zeros(4, 2, 4, 4)),
        (nn.LayerNorm(4), torch.zeros(4, 4)),
        (nn.Embedding(5, 3), torch.zeros(4, dtype=torch.long)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_curvlinops_knows_linear_and_conv2d_only(layer, x):
    """Any other parameter in the list raises: the tests pass it a filtered list of parameters."""
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(layer(x)[0].numel(), 3))
    with pytest.raises(NotImplementedError, match="Found parameters in un-supported layers"):
        operator(model, list(model.parameters()), x)


@pytest.mark.parametrize("approx", APPROX)
def test_curvlinops_circular_padding_is_silently_zero_padding(approx):
    """A is that of zero padding: no oracle here, the tests use the dense ones."""
    model, x = image_net(padding=1, padding_mode="circular")
    true = kfac(*reference(model, model[0], x), approx)
    zeros = kfac(*reference(model, model[0], x, patches_of=nn.Conv2d(2, 4, 3, padding=1)), approx)
    torch.testing.assert_close(operator(model, [model[0].weight], x, approx), zeros)
    assert not torch.allclose(zeros, true, rtol=0.01)


@pytest.mark.parametrize("approx", APPROX)
def test_curvlinops_averages_the_patches_of_groups(approx):
    """One A for all groups, of the mean of their patches, and B across them: no oracle for grouped convolutions."""
    model, x = image_net(groups=2)
    a, g = reference(model, model[0], x)
    averaged = a.unflatten(-1, (2, 9)).mean(-2)
    torch.testing.assert_close(operator(model, [model[0].weight], x, approx), kfac(averaged, g, approx))


@pytest.mark.parametrize("approx", APPROX)
def test_curvlinops_sums_the_uses_of_a_module_in_both_factors(approx):
    """Of U uses it makes U times the expand block, in reduce as well: no oracle for shared modules."""
    model, x = Twice(bias=False).double(), torch.randn(4, 3).double()
    a, g = reference(model, model.lin, x)
    torch.testing.assert_close(operator(model, [model.lin.weight], x, approx), 2 * kfac(a, g, "expand"))


def test_curvlinops_keeps_the_last_of_two_tied_modules():
    """The block of a weight tied between modules is the last module's alone: no oracle for tied weights."""
    model, x = nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(2)]).double(), torch.randn(4, 3).double()
    model[1].weight = model[0].weight
    a, g = reference(model, model[1], x)
    torch.testing.assert_close(operator(model, [model[0].weight], x), kfac(a, g, "expand"))


def test_curvlinops_refuses_uneven_same_padding():
    """'same' with an even kernel raises in expand: no oracle there."""
    model, x = image_net(padding="same")
    operator(model, [model[0].weight], x)
    model[0] = nn.Conv2d(2, 4, 2, padding="same").double()
    with pytest.raises(NotImplementedError, match="Unequal padding not supported in unfold"):
        operator(model, [model[0].weight], x)


def test_curvlinops_mse_has_twice_the_gaussian_hessian():
    """Λ = 2I as in BackPACK: comparisons for regression divide by 2."""
    layer, x = nn.Linear(4, 3, bias=False).double(), torch.randn(5, 4).double()
    stock = operator(layer, [layer.weight], x, loss=nn.MSELoss(reduction="sum"), y=torch.zeros(5, 3).double())
    torch.testing.assert_close(stock, torch.kron(5 * 2 * torch.eye(3).double(), outer(x) / 5))


# ---- torch


class Names(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen[getattr(func, "__name__", str(func))] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_torch_attention_is_one_call_to_a_function_mode(training):
    """A mode sees no linear inside and no hook of `out_proj` fires: attention needs a treatment of its own."""
    model, x, fired = nn.MultiheadAttention(4, 2).train(training), torch.randn(3, 2, 4), []
    model.out_proj.register_forward_hook(lambda *_: fired.append(1))
    with Names() as names:
        model(x, x, x)
    assert names.seen["multi_head_attention_forward"] == 1
    assert names.seen["linear"] == 0
    assert fired == []


class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(2, 2)

    def forward(self, x):
        return self.second(self.first(x))


def test_torch_functional_call_corrupts_a_module_of_two_names():
    """The values passed in stay for good, but for `tie_weights=False`: the package does not call it."""
    model, x = TwoNames(), torch.ones(1, 2)
    weight, passed = model.first.weight, {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    assert list(passed) == ["first.weight", "first.bias"]
    assert not functional_call(model, passed, x, tie_weights=False).any()
    assert model.first.weight is weight
    assert not functional_call(model, passed, x).any()
    assert model.first.weight is passed["first.weight"]
    assert not isinstance(model.first.weight, nn.Parameter)


def test_torch_functional_call_restores_a_weight_tied_between_modules():
    """One parameter in two modules is tied and restored, as it should be: only modules of two names need care."""
    model, x = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(2)]), torch.ones(1, 2)
    weight = model[1].weight = model[0].weight
    assert not functional_call(model, {"0.weight": torch.zeros(2, 2)}, x).any()
    assert model[0].weight is weight
    assert model[1].weight is weight
