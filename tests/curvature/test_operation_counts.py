"""What the fast paths must not do, counted, not timed: form patches, take weight gradients, run the model twice, fill the memory."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from bench_curvature.meter import peak_bytes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from laplace_ws import InvalidBatchError, Laplace
from laplace_ws.curvature import FACTOR_BACKENDS, Curvature, CurvatureSum, checks, make_backend
from laplace_ws.curvature import backend as backend_module
from laplace_ws.kfac import DiagAccumulator, KronAccumulator, approximation_by_parameter, conv_use
from laplace_ws.kfac.conv_gram import make_plan
from laplace_ws.likelihoods import Categorical
from laplace_ws.models import MLP, WideResNet

CURVATURES = ["ggn", "ggn_mc", "ggn_mc_rademacher", "ef"]
APPROXIMATIONS = ["reduce", "expand"]
N_CLASSES = 7


class Operations(TorchDispatchMode):
    """Counts operations by name, and keeps the sizes of what matrix products give."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.product_sizes = []
        self.weight_gradients = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        self.counts[name] += 1
        if name in ("mm", "bmm", "addmm", "addmm_", "addbmm", "baddbmm"):
            self.product_sizes.append(tuple(out.shape[-2:]))
        if name == "convolution_backward" and args[-1][1]:
            self.weight_gradients += 1
        return out


def make(network="wide-resnet", size=16):
    torch.manual_seed(0)
    x, y = torch.randn(16, 3, size, size), torch.randint(0, N_CLASSES, (16,))
    if network == "mlp":
        return MLP(3 * size**2, [19, 23], N_CLASSES), x, y
    return WideResNet(10, 1, 3, N_CLASSES, norm="none"), x, y


def curvature_sum(model, curvature="ggn", approx="reduce", backend="native"):
    return CurvatureSum(
        model,
        Categorical(),
        lambda p: KronAccumulator(p, approximation_by_parameter(approx, list(p))),
        curvature=Curvature(curvature),
        backend=make_backend(backend),
    )


@contextmanager
def no_patches(monkeypatch):
    """Fail wherever patches are formed, and form none to save calls, as for images as small as these."""

    def fail(*args):
        raise AssertionError("patches were formed")

    with monkeypatch.context() as patch:
        patch.setattr(conv_use, "patches", fail)
        patch.setattr(conv_use, "patch_columns", fail)
        patch.setattr(conv_use, "cheapest_plan", lambda geometry, shape: make_plan(geometry, tuple(shape[2:])))
        yield


@pytest.mark.parametrize("approx", APPROXIMATIONS)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("backend", FACTOR_BACKENDS)
def test_no_patches_and_no_weight_gradients(monkeypatch, backend, curvature, approx):
    model, x, y = make()
    total = curvature_sum(model, curvature, approx, backend)
    total.add(x[:4], y[:4])  # holds the backend against autograd, which needs both
    with no_patches(monkeypatch), Operations() as operations:
        total.add(x, y)
        total.accumulator.result()
    assert not operations.counts.keys() & {"im2col", "col2im", "unfold", "unfold_backward"}
    n_convs = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    if backend != "backpack":  # whose backward passes are convolutions too
        assert operations.counts["convolution"] == n_convs
    n_columns = N_CLASSES - 1 if curvature == "ggn" else 1
    assert operations.counts["convolution_backward"] <= n_columns * n_convs
    # where nothing lies before the first layer of a network, asdl can end a pass at its smallest parameter alone
    assert operations.weight_gradients <= (n_columns if backend == "asdl" else 0)


def test_the_counts_see_a_weight_gradient_and_patches(monkeypatch):
    model, x, y = make()
    with Operations() as operations:
        F.cross_entropy(model(x), y).backward()
        F.unfold(x, 3)
    assert operations.weight_gradients == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert operations.counts["im2col"] == 1
    total = curvature_sum(model, "ef", "expand")
    total.add(x, y)
    monkeypatch.setattr(conv_use.ConvUse, "plan", None)
    with no_patches(monkeypatch), pytest.raises(AssertionError, match="patches were formed"):
        total.add(x, y)


def test_large_batches_are_taken_in_parts_for_the_exact_ggn_alone(monkeypatch):
    monkeypatch.setattr(checks, "SMALL_COLUMN_BYTES", 0)
    model, x, y = make(size=32)
    calls = []
    model.register_forward_hook(lambda module, arguments, output: calls.append(len(output)))
    results = []
    for curvature, sizes in (("ggn", [4, 4, 2, 8, 8]), ("ef", [4, 4, 2, 16])):
        calls.clear()
        total = curvature_sum(model, curvature, "expand")
        total.add(x, y)
        assert calls == sizes
        results.append(total.accumulator.result())
    whole = curvature_sum(model, "ggn", "expand")
    whole._parts = lambda x, y: [slice(0, 16)]
    whole.add(x, y)
    for name, block in whole.accumulator.result().items():
        torch.testing.assert_close(results[0][name].B, block.B, rtol=1e-4, atol=1e-6)
    total = curvature_sum(model, "ggn")
    with pytest.raises(InvalidBatchError, match=r"labels of shape \(16,\) .* they are \(12,\)"):
        total.add(x, y[:12])


@pytest.mark.parametrize("curvature", CURVATURES)
def test_linear_layers_take_no_weight_gradient(curvature):
    model, x, y = make("mlp")
    total = curvature_sum(model, curvature)
    total.add(x[:4], y[:4])
    shapes = {tuple(p.shape) for p in model.parameters() if p.ndim == 2}
    with Operations() as operations:
        total.add(x, y)
    assert not shapes & set(operations.product_sizes)
    with Operations() as operations:
        F.cross_entropy(model(x), y).backward()
    assert shapes <= set(operations.product_sizes)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("backend", FACTOR_BACKENDS)
def test_one_forward_pass_a_batch(backend, curvature):
    """And before the first batch, a check on four of its examples: once without the backend, once with it, and two of them alone."""
    model, x, y = make("mlp")
    calls = []
    model.register_forward_hook(lambda module, arguments, output: calls.append(len(output)))
    total = curvature_sum(model, curvature, backend=backend)
    total.add(x, y)
    total.add(x, y)
    total.add(x[:11], y[:11])
    assert calls == [4, 4, 2, 16, 16, 11]


@pytest.mark.parametrize(
    ("curvature", "approx", "bound"),
    [
        ("ef", "reduce", 1.0),
        ("ggn_mc", "reduce", 1.0),
        ("ggn", "reduce", 0.8),
        ("ef", "expand", 1.1),
        ("ggn", "expand", 0.8),
    ],
)
def test_peak_memory_is_that_of_a_training_step(monkeypatch, curvature, approx, bound):
    monkeypatch.setattr(checks, "SMALL_COLUMN_BYTES", 0)  # images as small as these would be taken together
    model, x, y = make(size=32)

    def training_step():
        F.cross_entropy(model(x), y).backward()

    total = curvature_sum(model, curvature, approx)
    for _ in range(2):
        total.add(x, y)
        training_step()
        model.zero_grad()
    of_step, _, of_curvature = peak_bytes([training_step, model.zero_grad, lambda: total.add(x, y)], x.device)
    assert of_curvature < bound * of_step


def test_gradients_of_each_example_are_formed_a_few_columns_at_a_time(monkeypatch):
    """Many columns fit at the outputs of a perceptron; times its weights they would be gigabytes for a larger one."""
    model, x, y = make("mlp")
    at_once = []
    add = DiagAccumulator.add
    monkeypatch.setattr(DiagAccumulator, "add", lambda self, number, g: at_once.append(len(g)) or add(self, number, g))
    for columns, expected in ((10, {N_CLASSES - 1}), (4, {4, 2}), (0.5, {1})):
        at_once.clear()
        n_bytes = int(columns * len(x) * sum(p.nbytes for p in model.parameters()))
        monkeypatch.setattr(backend_module, "COLUMN_BYTES", n_bytes)
        Laplace(model, "classification", hessian_structure="diag").fit([(x, y)])
        assert set(at_once) == expected
