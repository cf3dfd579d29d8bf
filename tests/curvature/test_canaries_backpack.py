"""What stock BackPACK does today that the backends correct: a canary that dies tells which correction to revisit."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from backpack import backpack, extend
from backpack import extensions as ext
from backpack.context import CTX
from backpack.core.derivatives.conv2d import Conv2DDerivatives
from backpack.custom_module.branching import Parallel
from backpack.extensions.saved_quantities import SavedQuantities
from curvature.canary_nets import LABELS, Then, Twice, image_net, outer, reference
from torch import nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]


@pytest.fixture(autouse=True)
def _own_hooks():
    """BackPACK keeps the handles of every hook in one global list."""
    before = list(CTX.hook_handles)
    yield
    for handle in CTX.hook_handles[len(before) :]:
        handle.remove()
    CTX.hook_handles = before


def backprop(model, x, *extensions, loss=None, y=LABELS, **kwargs):
    loss = extend(loss or nn.CrossEntropyLoss(reduction="sum"))
    with backpack(*extensions, **kwargs):
        loss(model(x), y).backward()


@pytest.mark.parametrize("kwargs", [{}, {"stride": 2, "padding": 1}], ids=["plain", "strided"])
def test_backpack_convolution_is_neither_expand_nor_reduce(kwargs):
    """B is the reduce factor and A is R times the expand factor: the BackPACK backend has a rule of its own."""
    model, x = image_net(**kwargs)
    a, g = reference(model, model[0], x)
    backprop(extend(model), x, ext.KFLR())
    stock_b, stock_a = model[0].weight.kflr
    torch.testing.assert_close(stock_b, outer(g.sum(-2)))
    torch.testing.assert_close(stock_a, a.shape[1] * outer(a) / a.shape[:2].numel())
    torch.testing.assert_close(model[0].bias.kflr[0], stock_b)


def test_backpack_linear_is_the_true_factor():
    """With one position B and A are the project's, so only what shares weights needs a correction."""
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double(), torch.randn(4, 3).double()
    a, g = reference(model, model[0], x)
    backprop(extend(model), x, ext.KFLR())
    torch.testing.assert_close(model[0].weight.kflr, [outer(g), outer(a) / 4])


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (nn.Linear(4, 3), (2, 4), r"Only 2d inputs are supported by KFLR \(got 3\)"),
        (nn.Conv2d(2, 2, 3, groups=2), (2, 4, 4), r"groups ≠ 1 is not supported by KFLR \(got 2\)"),
        (nn.LayerNorm(4), (4,), r"does not have an extension for Module .*LayerNorm"),
        (nn.GroupNorm(2, 4), (4, 3), r"does not have an extension for Module .*GroupNorm"),
        (nn.BatchNorm1d(4).eval(), (4,), r"does not have an extension for Module .*BatchNorm1d"),
    ],
    ids=["tokens", "groups", "layer norm", "group norm", "batch norm"],
)
def test_backpack_kflr_refuses(layer, shape, message):
    """Positions of a Linear, groups and normalisations raise: the backend registers module extensions of its own."""
    x, layer = torch.randn(4, *shape), deepcopy(layer)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(layer(x)[0].numel(), 3))
    with pytest.raises(NotImplementedError, match=message):
        backprop(extend(model), x, ext.KFLR())


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.branch = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        x = self.stem(x)
        return x + self.branch(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: extend(nn.Sequential(nn.Linear(3, 3), Parallel(nn.Identity(), nn.Linear(3, 3)))),
        lambda: extend(Residual(), use_converter=True),
    ],
    ids=["parallel", "converted"],
)
def test_backpack_kflr_has_no_branch_rule(make):
    """KFLR cannot add what two branches send back, as KFAC and DiagGGNExact can: the backend's extension adds them."""
    for extension in (ext.KFAC(), ext.DiagGGNExact()):
        backprop(make(), torch.randn(4, 3), extension)
    with pytest.raises(NotImplementedError, match="No accumulation rule for backpropagated info specified"):
        backprop(make(), torch.randn(4, 3), ext.KFLR())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_backpack_mse_has_twice_the_gaussian_hessian(reduction):
    """Λ = 2I of a squared error without ½, over N·C for the mean: the backend back-propagates columns of its own."""
    layer, x = extend(nn.Linear(4, 3).double()), torch.randn(5, 4).double()
    backprop(layer, x, ext.SqrtGGNExact(), loss=nn.MSELoss(reduction=reduction), y=torch.zeros(5, 3).double())
    scale = {"sum": 2.0, "mean": 2.0 / (5 * 3)}[reduction]
    torch.testing.assert_close(outer(layer.bias.sqrt_ggn_exact), 5 * scale * torch.eye(3).double())


def test_backpack_writes_gradients_in_backward_and_not_in_autograd_grad():
    """`.backward()` fills `.grad`; `autograd.grad` runs the same rules and does not: the backend calls that."""
    layer, x, loss = extend(nn.Linear(4, 3)), torch.randn(4, 4), extend(nn.CrossEntropyLoss())
    with backpack(ext.KFLR()):
        torch.autograd.grad(loss(layer(x), LABELS), list(layer.parameters()))
    assert layer.weight.grad is None
    by_grad = layer.weight.kflr
    with backpack(ext.KFLR()):
        loss(layer(x), LABELS).backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(by_grad, layer.weight.kflr)


def test_backpack_draws_from_the_global_generator():
    """KFAC's labels move the global state: the backend draws from the caller's own generator."""
    layer, x, before = extend(nn.Linear(4, 3)), torch.randn(4, 4), torch.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        backprop(layer, x, ext.KFAC())
        assert not torch.equal(torch.get_rng_state(), before)


def stored(module):
    return sorted(name for name in vars(module) if name == "output" or name.startswith("input"))


def test_backpack_leaves_hooks_and_tensors_behind():
    """A flag, two hooks, results, and tensors of a forward with no backward stay: the backend removes them."""
    model = extend(nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), nn.Linear(3, 3)))
    assert [getattr(module, "_backpack_extend", False) for module in (model, *model)] == [False, True, True, True]
    assert [len(module._forward_hooks) for module in model] == [1, 1, 1]
    assert [(len(module._backward_hooks), module._is_full_backward_hook) for module in model] == [(1, True)] * 3
    f = model(torch.randn(4, 3))
    assert [stored(module) for module in model] == [["input0", "output"]] * 3
    with backpack(ext.KFLR(), retain_graph=True):
        extend(nn.CrossEntropyLoss())(f, LABELS).backward(retain_graph=True)
    assert [stored(module) for module in model] == [["input0", "output"]] * 3
    F.cross_entropy(f, LABELS).backward()
    assert [stored(module) for module in model] == [[]] * 3
    assert all(hasattr(p, "kflr") for p in model.parameters())


def test_backpack_remove_hooks_is_for_the_whole_process_and_for_good():
    """`CTX.remove_hooks` strips every model, and the flag stops a new `extend`: the backend removes its own handles."""
    mine, yours = extend(nn.Linear(3, 3)), extend(nn.Linear(3, 3))
    ours = CTX.hook_handles[-4:]
    CTX.hook_handles, others = ours, CTX.hook_handles[:-4]
    CTX.remove_hooks()
    CTX.hook_handles = others
    extend(mine)
    assert mine._backpack_extend
    assert not mine._forward_hooks
    assert not yours._forward_hooks


def test_backpack_breaks_an_in_place_activation():
    """A full backward hook's output is a view that nothing may change in place: the backend works on a copy."""
    model = extend(nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)))
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        model(torch.randn(4, 3))


def convert(then):
    """The caller's model after a conversion, and the graph's own calls."""
    model = Then(then)
    graph = extend(model, use_converter=True)
    calls = [node.op for node in graph.graph.nodes if node.op.startswith("call_") and node.op != "call_module"]
    return model, graph, calls


def test_backpack_converter_alters_the_callers_model():
    """It turns `inplace` off and adds modules on the caller's own model: the backend converts a copy."""
    model, graph, calls = convert(lambda net, h: h * 2.0)
    assert not model.relu.inplace
    assert [name for name, _ in model.named_children()] == ["lin", "relu", "scale_module0"]
    assert graph.lin is model.lin
    assert calls == []


@pytest.mark.parametrize("then", [lambda net, h: h * h, lambda net, h: h * 2], ids=["tensors", "int"])
def test_backpack_converter_refuses_products_but_with_a_float(then):
    """`tensor * tensor` and `tensor * 2` raise: the backend makes modules of all calls itself."""
    model = Then(then)
    with pytest.raises(RuntimeError, match=r"Expecting types \[float, Node\]"):
        extend(model, use_converter=True)
    assert model.relu.inplace


@pytest.mark.parametrize(
    ("then", "op"),
    [
        (lambda net, h: F.relu(h), "call_function"),
        (lambda net, h: torch.mul(h, 2.0), "call_function"),
        (lambda net, h: h.mul(2.0), "call_method"),
    ],
    ids=["F.relu", "torch.mul", "mul"],
)
def test_backpack_converter_leaves_functions_with_a_warning(then, op):
    """Second order then fails in the backward with no quantity: the backend makes modules of such calls."""
    with pytest.warns(UserWarning, match=f"may break second-order extensions: op={op}"):
        _, graph, calls = convert(then)
    assert calls == [op]
    with pytest.raises(AssertionError, match="expects a backpropagation quantity but it is None"):
        backprop(graph, torch.randn(4, 3), ext.DiagGGNExact())


@pytest.mark.filterwarnings("ignore:Encountered node that may break")
@pytest.mark.parametrize(
    ("then", "message"),
    [
        (lambda net, h: h + h.sum(0, keepdim=True), "Shapes don't match"),
        (lambda net, h: h + 1.0, "Expecting tuple of tensors"),
    ],
    ids=["broadcast", "constant"],
)
def test_backpack_converter_turns_sums_into_modules_that_refuse(then, message):
    """SumModule wants tensors of one shape, so a network that ran stops running: the backend has a sum of its own."""
    model, graph, _ = convert(then)
    with pytest.raises(AssertionError, match=message):
        graph(torch.randn(4, 3))
    assert model(torch.randn(4, 3)).shape == (4, 3)


def test_backpack_keys_quantities_by_address():
    """A view has the key of its base: no module of the backend returns a view."""
    base, quantities = torch.randn(4, 6), SavedQuantities()
    quantities.save_quantity(base.data_ptr(), "of the base", lambda old, new: f"{old}, {new}")
    quantities.save_quantity(base.flatten()[:2].data_ptr(), "of a view", lambda old, new: f"{old}, {new}")
    assert quantities.retrieve_quantity(base.data_ptr(), delete_old=True) == "of the base, of a view"


@pytest.mark.parametrize("flat_last", [False, True], ids=["flat first", "flat last"])
def test_backpack_mixes_a_flattened_branch_with_its_base(flat_last):
    """Whether a branch that starts with Flatten works depends on the order of branches: same correction."""
    flat = nn.Sequential(nn.Flatten(), nn.Linear(9, 3))
    branches = [flat, nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(9, 3))]
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), Parallel(*(branches[::-1] if flat_last else branches)))
    if flat_last:
        return backprop(extend(model), torch.randn(4, 1, 3, 3), ext.DiagGGNExact())
    with pytest.raises(RuntimeError, match=r"size of tensor a \(3\) must match the size of tensor b \(9\)"):
        backprop(extend(model), torch.randn(4, 1, 3, 3), ext.DiagGGNExact())


def test_backpack_extension_object_is_not_reusable_on_an_input_with_gradient():
    """What was sent back to the input meets the next pass: the backend makes a new extension for each."""
    layer, x, extension = extend(nn.Linear(3, 3)), torch.randn(4, 3, requires_grad=True), ext.KFLR()
    backprop(layer, x, extension)
    assert list(extension.saved_quantities._saved_quantities) == [x.data_ptr()]
    with pytest.raises(NotImplementedError, match="No accumulation rule"):
        backprop(layer, x, extension)


def test_backpack_circular_padding_is_silently_zero_padding():
    """Parameter and input rules both pad with zeros: the backend follows such a module's autograd graph."""
    model, x = image_net(padding=1, padding_mode="circular")
    conv = model[0]
    z = conv(x)
    (g,) = torch.autograd.grad(F.cross_entropy(model[1:](z), LABELS, reduction="sum"), z, retain_graph=True)
    true_x = x.clone().requires_grad_()
    (vjp,) = torch.autograd.grad(conv(true_x), true_x, g)
    backprop(extend(model), x, ext.BatchGrad())
    per_example = [
        torch.nn.grad.conv2d_weight(x[i : i + 1], conv.weight.shape, g[i : i + 1], padding=1) for i in range(4)
    ]
    torch.testing.assert_close(conv.weight.grad_batch, torch.stack(per_example))
    assert not torch.allclose(conv.weight.grad_batch.sum(0), conv.weight.grad, rtol=0.01)
    model(x)
    stock = Conv2DDerivatives().jac_t_mat_prod(conv, None, None, g[None])[0]
    torch.testing.assert_close(stock, torch.nn.grad.conv2d_input(x.shape, conv.weight, g, padding=1))
    assert not torch.allclose(stock, vjp, rtol=0.01)


def test_backpack_keeps_only_the_last_use_of_a_module():
    """The first use finds no tensors, or with `retain_graph` the last use's: the backend has a copy for each call."""
    model, x = Twice().double(), torch.randn(4, 3).double()
    a, g = reference(model, model.lin, x, lambda f: (f.softmax(-1) - F.one_hot(LABELS, 3))[None])
    extend(model.lin)
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'output'"):
        backprop(model, x, ext.BatchGrad())
    backprop(model, x, ext.BatchGrad(), retain_graph=True)
    torch.testing.assert_close(model.lin.weight.grad_batch, g[0, :, 0, :, None] * a[:, 1, None, :])


def test_backpack_converter_copies_a_repeated_module_unless_it_has_parameters():
    """A repeated ReLU becomes two and a repeated Linear raises: the backend copies both, sharing weights."""
    _, graph, _ = convert(lambda net, h: net.relu(h))
    assert [name for name, _ in graph.named_children()] == ["lin", "relu0", "relu1"]
    with pytest.raises(NotImplementedError, match="Cycle with parameters detected"):
        extend(Twice(), use_converter=True)


def test_backpack_extends_a_container_with_a_forward_of_its_own():
    """Such a container is taken for an operation, and raises or warns: the backend extends leaves only."""
    with pytest.raises(NotImplementedError, match=r"does not have an extension for Module .*Residual"):
        backprop(extend(Residual()), torch.randn(4, 3), ext.KFLR())
    with pytest.warns(UserWarning, match=r"Module .*Residual.* although the module has parameters"):
        backprop(extend(Residual()), torch.randn(4, 3), ext.BatchGrad())
