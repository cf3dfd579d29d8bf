"""Samples of the linearised network through samples of its weights: f + J δ, and when it is chosen."""

import numpy as np
import pytest
import torch
from bench_curvature.meter import peak_bytes
from cases import CASES
from posterior.shared import STRUCTURES, case_of, fitted
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from laplace_ws import Laplace
from laplace_ws.curvature import exact
from laplace_ws.curvature.jacobian import can_push_forward
from laplace_ws.likelihoods.links import draw_outputs
from laplace_ws.matrices import Layout
from laplace_ws.models import build_model
from laplace_ws.posterior.linear_samples import LinearSamples
from laplace_ws.posterior.predict import PredictionOptions
from laplace_ws.posterior.routes import Route

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def through_weights(monkeypatch):
    monkeypatch.setattr(Route, "is_through_weights", True)


@pytest.fixture
def through_covariance(monkeypatch):
    monkeypatch.setattr(Route, "is_through_weights", False)


def of_dense_jacobian(la: Laplace, x, deviations, covered=slice(None)):
    """f + J δ by a backward pass for each output of each example."""
    J = exact.jacobian(la.model, x)[..., covered]
    with torch.no_grad():
        f = la.model.eval()(x)
    return f + torch.einsum("ndp,sp->snd", J, deviations).reshape(len(deviations), *f.shape)


# ------------------------------------------------------------------ exact


@pytest.mark.many(3)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_samples_are_the_jacobian_times_the_drawn_weights(case, through_weights):
    la, x, _ = fitted("diag", case)
    samples = la.functional_samples(x, n_samples=3, joint=True, generator=seeded())
    deviations = la.sample(3, seeded()) - la.mean
    torch.testing.assert_close(samples, of_dense_jacobian(la, x, deviations), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_draws_what_sample_draws(structure, through_weights):
    la, x, _ = fitted(structure, "cnn")
    la.covariance_scale = 0.3
    expected = of_dense_jacobian(la, x, la.sample(4, seeded()) - la.mean)
    torch.testing.assert_close(la.functional_samples(x, n_samples=4, generator=seeded()), expected)
    probabilities = la(x, link_approx="mc", n_samples=4, generator=seeded())
    torch.testing.assert_close(probabilities, expected.softmax(-1).mean(0))


@pytest.mark.parametrize("subset", ["last_layer", "subnetwork", ["0.bias", "2.*"]])
def test_some_of_the_weights(subset, through_weights):
    model, x, y = case_of("mlp").make()
    slices = exact.parameter_slices(model)
    covered = {
        "last_layer": [*range(slices["2.weight"].start, slices["2.bias"].stop)],
        "subnetwork": [0, 3, 13, 21],
    }.get(
        str(subset),
        [
            *range(slices["0.bias"].start, slices["0.bias"].stop),
            *range(slices["2.weight"].start, slices["2.bias"].stop),
        ],
    )
    options = {"subnetwork_indices": covered} if subset == "subnetwork" else {}
    la = Laplace(model, "classification", subset, "full", **options)
    la.fit([(x, y)])
    assert la.n_params == len(covered)
    expected = of_dense_jacobian(la, x, la.sample(3, seeded()) - la.mean, covered)
    torch.testing.assert_close(la.functional_samples(x, n_samples=3, generator=seeded()), expected)


def test_tied_weights_in_one_block(through_weights):
    la, x, _ = fitted("kron", "tied-weights")
    expected = of_dense_jacobian(la, x, la.sample(3, seeded()) - la.mean)
    torch.testing.assert_close(la.functional_samples(x, n_samples=3, generator=seeded()), expected)


class TwoInputs(nn.Module):
    """Of rows (x1, x2), or of a mapping."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, a, b=None):
        a, b = (a["input_ids"], a["other"]) if b is None else (a, b)
        return torch.tanh(self.layer(a)) * self.layer(b)


@pytest.mark.parametrize("are_mappings", [True, False])
def test_structured_inputs(are_mappings, through_weights):
    torch.manual_seed(0)
    model, a, b = TwoInputs().double(), torch.randn(5, 3, dtype=F64), torch.randn(5, 3, dtype=F64)
    y = torch.randint(0, 4, (5,))
    batch = {"input_ids": a, "other": b, "labels": y} if are_mappings else (a, b, y)
    la = Laplace(model, "classification", hessian_structure="kron")
    la.fit([batch])
    x = {"input_ids": a, "other": b} if are_mappings else (a, b)
    J, f = la.jacobians(x)
    deviations = la.sample(3, seeded()) - la.mean
    expected = f + torch.einsum("ndp,sp->snd", J, deviations)
    torch.testing.assert_close(la.functional_samples(x, n_samples=3, generator=seeded()), expected)


@pytest.mark.parametrize("structure", ["kron", "lowrank"])
def test_part_by_part_within_the_memory(structure):
    la, x, _ = fitted(structure, "cnn")
    la(x)
    directions = torch.randn(5, la.n_params, dtype=F64)
    of_parts = LinearSamples(la.network, la.fitted.output_shape, memory_budget=1)
    assert of_parts._examples_at_once() == 1
    found = of_parts.outputs(x, directions.split(2))
    torch.testing.assert_close(found, of_dense_jacobian(la, x, directions))


def test_draws_in_batches_within_the_memory(through_weights):
    """Two at a time, in memory that is used again: as `sample` draws two, two and one."""
    la, x, _ = fitted("diag", "cnn")
    la.memory_budget = 2 * 8 * la.n_params
    generator = seeded()
    deviations = torch.cat([la.sample(n, generator) for n in (2, 2, 1)]) - la.mean
    expected = of_dense_jacobian(la, x, deviations)
    torch.testing.assert_close(la.functional_samples(x, n_samples=5, generator=seeded()), expected)
    outputs = la.network.outputs(la.predictor.inputs(x), iter(la.mean + deviations), backprop=False)
    torch.testing.assert_close(la(x, pred_type="nn", n_samples=5, generator=seeded()), outputs.softmax(-1).mean(0))


def test_memory_stays_when_images_grow(through_weights):
    torch.manual_seed(0)
    model = build_model("lenet", in_channels=1, image_size=(28, 28), n_classes=10)
    la = Laplace(model, "classification", hessian_structure="diag", curvature="ef", memory_budget=2**23)
    la.fit([(torch.randn(8, 1, 28, 28), torch.arange(8))])
    predict = [lambda n=n: la(torch.randn(n, 1, 28, 28), link_approx="mc", n_samples=3) for n in (16, 128)]
    predict[0]()
    few, many = peak_bytes(predict, torch.device("cpu"))
    assert many < 1.3 * few + 128 * 28 * 28 * 4 * 2  # the images themselves
    assert many < 2 * la.memory_budget
    la.memory_budget = 2**30
    (at_once,) = peak_bytes(predict[1:], torch.device("cpu"))
    assert at_once > 1.5 * many


# ------------------------------------------------------------------ the same distribution


@pytest.mark.parametrize("structure", STRUCTURES)
def test_moments_of_many_samples(structure, through_weights):
    """Within five standard errors of the mean and of each covariance; joint over examples and outputs."""
    la, x, _ = fitted(structure, "mlp")
    n = 20_000
    samples = la.functional_samples(x[:3], n_samples=n, joint=True, generator=seeded(1)).flatten(1)
    f, covariance = la.functional_moments(x[:3], joint=True)
    variances = covariance.diagonal()
    assert ((samples.mean(0) - f).abs() < 5 * (variances / n).sqrt()).all()
    errors = ((variances[:, None] * variances + covariance.square()) / n).sqrt()
    assert ((torch.cov(samples.mT) - covariance).abs() < 5 * errors).all()


def test_sequences_one_covariance_per_term(through_weights):
    la, x, _ = fitted("kron", "mlp-tokens")
    samples = la.functional_samples(x, n_samples=20_000, generator=seeded(1))
    f, covariance = la.functional_moments(x)
    by_term = samples.flatten(1, 2).transpose(0, 1)
    found = torch.stack([torch.cov(term.mT) for term in by_term]).reshape(covariance.shape)
    variances = covariance.diagonal(dim1=-2, dim2=-1)
    errors = ((variances[..., :, None] * variances[..., None, :] + covariance.square()) / len(samples)).sqrt()
    assert ((samples.mean(0) - f).abs() < 5 * (variances / len(samples)).sqrt()).all()
    assert ((found - covariance).abs() < 5 * errors).all()


def test_one_seed_gives_one_prediction(through_weights):
    la, x, _ = fitted("kron")
    draws = [la(x, link_approx="mc", n_samples=5, generator=seeded(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype, through_weights):
    la, x, y = fitted("kron", "cnn")
    half = Laplace(la.model.to(dtype), "classification", hessian_structure="kron", prior_precision=3.0)
    half.fit([(x.to(dtype), y)])
    samples = half.functional_samples(x.to(dtype), n_samples=3, generator=seeded())
    assert samples.dtype == torch.float32
    deviations = (half.sample(3, seeded()) - half.mean).double()
    la.model.double()
    expected = of_dense_jacobian(la, x, deviations).float()
    error = (samples - expected).norm() / (expected - expected.mean(0)).norm()
    assert error < 8 * torch.finfo(dtype).eps


# ------------------------------------------------------------------ what a model may do


def test_the_model_is_left_as_found(through_weights):
    la, x, _ = fitted("kron", "inplace-batchnorm")
    la.model.train()
    la.model.requires_grad_(True)
    first = next(iter(la.model.parameters()))
    first.grad = torch.ones_like(first)
    state = {name: tensor.clone() for name, tensor in la.model.state_dict().items()}
    before = x.clone()
    la(x, link_approx="mc", n_samples=3)
    assert all(m.training for m in la.model.modules())
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.requires_grad and (p is first or p.grad is None) for p in la.model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in la.model.state_dict().items())
    assert torch.equal(x, before)


class Once(torch.autograd.Function):
    """A tanh whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0] ** 2)


class Hidden(Once):
    """One whose backward pass is hidden from autograd."""

    @staticmethod
    def backward(ctx, g):
        factor = 1 - ctx.saved_tensors[0].numpy() ** 2
        return torch.from_numpy(np.multiply(g.detach().numpy(), factor))


class Own(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Linear(3, 4), nn.Linear(4, 3), function

    def forward(self, x):
        return self.last(self.function.apply(self.first(x)))


@pytest.mark.parametrize("function", [Once, Hidden])
def test_what_cannot_be_differentiated_twice_goes_through_the_covariance(function, through_weights):
    torch.manual_seed(0)
    model, x, y = Own(function).double(), torch.randn(6, 3, dtype=F64), torch.randint(0, 3, (6,))
    la = Laplace(model, "classification")
    la.fit([(x, y)])
    assert not can_push_forward(model, x, list(model.parameters()))
    expected = draw_outputs(*la.functional_moments(x), 5, seeded())
    torch.testing.assert_close(la.functional_samples(x, n_samples=5, generator=seeded()), expected)
    torch.testing.assert_close(la(x, link_approx="mc", n_samples=5, generator=seeded()), expected.softmax(-1).mean(0))


class Straight(nn.Module):
    """Rounds, with the gradient of the identity, and has a part without a gradient: forward-mode AD would find another Jacobian."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)
        self.unregistered = [self.last.weight]

    def forward(self, x):
        h = self.first(x)
        h = h + (torch.round(h) - h).detach()
        with torch.no_grad():
            scale = self.first(x).square().mean(1, keepdim=True)
        return nn.functional.linear(h, self.unregistered[0]) * scale + self.last.bias


def test_the_jacobian_is_the_one_of_backward_passes(through_weights):
    torch.manual_seed(0)
    model, x, y = Straight().double(), torch.randn(6, 3, dtype=F64), torch.randint(0, 3, (6,))
    la = Laplace(model, "classification", hessian_structure="diag")
    la.fit([(x, y)])
    expected = of_dense_jacobian(la, x, la.sample(3, seeded()) - la.mean)
    torch.testing.assert_close(la.functional_samples(x, n_samples=3, generator=seeded()), expected)


def test_the_graph_to_the_inputs_is_kept_through_the_covariance(through_weights):
    la, x, _ = fitted("kron", "mlp")
    x.requires_grad_()
    assert la(x, link_approx="mc", n_samples=3, backprop=True).requires_grad


def test_variances_alone_have_independent_draws(through_weights):
    la, x, _ = fitted("kron", "mlp")
    f, variances = la.functional_moments(x, diagonal_output=True)
    expected = draw_outputs(f, variances, 5, seeded())
    found = la.functional_samples(x, n_samples=5, diagonal_output=True, generator=seeded())
    torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------ which way


def lenet(structure: str, n_classes: int):
    torch.manual_seed(0)
    model = build_model("lenet", in_channels=1, image_size=(28, 28), n_classes=n_classes)
    la = Laplace(model, "classification", hessian_structure=structure, curvature="ef")
    la.fit([(torch.randn(8, 1, 28, 28), torch.arange(8))])
    return la


def route(la: Laplace, n: int, n_samples: int, layout=Layout.EXAMPLE) -> Route:
    network = la.network
    shapes, positions = network.subset.parameter_shapes, network.check.positions
    return Route(la.H, shapes, positions, n, la.fitted.output_shape, n_samples, layout)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_it_depends_on_outputs_and_samples(structure):
    la, _, _ = fitted(structure, "cnn")
    shapes, positions = la.network.subset.parameter_shapes, la.network.check.positions
    by_samples = [Route(la.H, shapes, positions, 6, (20,), S, Layout.EXAMPLE) for S in (1, 10, 100, 1000, 100_000)]
    choices = [r.is_through_weights for r in by_samples]
    assert choices == sorted(choices, reverse=True)  # few samples of the weights, many through a covariance
    assert (choices[0], choices[-1]) == (True, False)
    by_classes = [Route(la.H, shapes, positions, 6, (C,), 100, Layout.EXAMPLE) for C in (2, 10, 100, 1000, 10_000)]
    assert len({r.through_weights() for r in by_classes}) == 1
    choices = [r.is_through_weights for r in by_classes]
    assert choices == sorted(choices)
    assert (choices[0], choices[-1]) == (False, True)


def test_the_joint_covariance_grows_with_the_square_of_the_examples():
    la, _, _ = fitted("diag", "cnn")
    costs = [route(la, n, 100, Layout.JOINT).through_covariance() for n in (1000, 2000)]
    assert costs[1] > 3.9 * costs[0]
    assert route(la, 1000, 100, Layout.JOINT).is_through_weights
    assert not route(la, 1000, 100).is_through_weights


@pytest.mark.parametrize("structure", ["kron", "diag"])
@pytest.mark.parametrize(("n_classes", "is_through_weights"), [(8, False), (300, True)])
def test_the_chosen_way_takes_fewer_products(structure, n_classes, is_through_weights, monkeypatch):
    la, x = lenet(structure, n_classes), torch.randn(8, 1, 28, 28)
    assert route(la, len(x), 20).is_through_weights is is_through_weights

    def products() -> int:
        with FlopCounterMode(display=False) as counter:
            la(x, link_approx="mc", n_samples=20)
        return counter.get_total_flops()

    la(x), la(x, link_approx="mc", n_samples=20)  # the checks, and eigenvectors
    chosen = products()
    monkeypatch.setattr(Route, "is_through_weights", not is_through_weights)
    other = products() if (n_classes, structure) != (8, "diag") else None  # draws of a diagonal count no product
    assert other is None or chosen < other


def test_many_classes_take_no_jacobian():
    la = lenet("diag", 300)
    x = torch.randn(8, 1, 28, 28)
    options = PredictionOptions(n_samples=20, generator=seeded())
    samples = la.predictor.samples_through_weights(x, options, Layout.EXAMPLE)
    assert samples.shape == (20, 8, 300)
    torch.testing.assert_close(la(x, link_approx="mc", n_samples=20, generator=seeded()), samples.softmax(-1).mean(0))


def test_few_classes_are_as_before(through_covariance):
    la, x, _ = fitted("kron", "mlp")
    expected = draw_outputs(*la.functional_moments(x), 100, seeded()).softmax(-1).mean(0)
    torch.testing.assert_close(la(x, link_approx="mc", generator=seeded()), expected)
