"""What every backend holds to: the same numbers on the models that it covers, the exact error on the others, models left as found."""

import itertools
from contextlib import contextmanager

import curvlinops
import pytest
import torch
from backend_coverage import BACKEND_NAMES, refusal
from cases import CASES, LINEAR_CASES, WIDE_RESNETS, LinearCase, N, double
from curvature.shared import close
from torch import nn

from laplace_ws import InvalidBatchError, Laplace, UnsupportedParameterError, kron_factors
from laplace_ws.curvature import exact, jacobians

CURVATURES = ["ggn", "ef"]
SETTINGS = ["expand", "reduce"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.many(3, always="native"),
]


def covered(cases, backends=BACKEND_NAMES):
    """Parameters (backend, case) for every case that a backend covers."""
    return [
        pytest.param(backend, case, id=f"{backend}-{case}")
        for backend, case in itertools.product(backends, cases)
        if refusal(backend, case) is None
    ]


OTHER_BACKENDS = [name for name in BACKEND_NAMES if name != "native"]


def batches(x, y):
    """A ragged last batch."""
    return [(x[:3], y[:3]), (x[3:], y[3:])]


# ------------------------------------------------------------------ the same numbers


def assert_same_factors(case, backend, data, model, **options):
    native = kron_factors(model, case.likelihood, data, backend="native", **options)
    other = kron_factors(model, case.likelihood, data, backend=backend, **options)
    assert list(native) == list(other)
    for name, block in native.items():
        assert block.B.isfinite().all()
        assert block.B.count_nonzero(), f"{name} has no curvature, so nothing is compared"
        close(other[name].B, block.B)
        assert (other[name].A is None) == (block.A is None), name
        if block.A is not None:
            close(other[name].A, block.A)
            assert other[name].n_inputs == pytest.approx(block.n_inputs)


@pytest.mark.parametrize("kfac_approx", SETTINGS)
@pytest.mark.parametrize("curvature", ["ggn", "ggn_mc", "ef"])
@pytest.mark.parametrize(("backend", "case"), covered([*CASES, *WIDE_RESNETS], OTHER_BACKENDS))
def test_factors_agree(backend, case, curvature, kfac_approx):
    model, x, y = case.make()
    torch.manual_seed(0)
    assert_same_factors(case, backend, batches(x, y), model, curvature=curvature, kfac_approx=kfac_approx, mc_samples=2)


@pytest.mark.parametrize(("backend", "case"), covered([*CASES, WIDE_RESNETS[0]], OTHER_BACKENDS))
def test_factors_of_one_example_agree(backend, case):
    model, x, y = case.make()
    assert_same_factors(case, backend, [(x[:1], y[:1])], model)


def relative_error(estimate, truth):
    return ((estimate - truth).norm() / truth.norm()).item()


def group_diagonal(block, n_groups):
    """Zero the entries between channel groups, each a layer of its own."""
    mask = torch.block_diag(*[torch.ones(len(block) // n_groups, len(block) // n_groups)] * n_groups)
    return block * mask


def errors_on_linear(case: LinearCase, setting: str, kfac_approx: str, backend: str) -> dict[str, float]:
    """Relative error of each block of a deep linear network in a setting, against the dense oracle."""
    model, x = double(case.make_model(setting)), case.make_x()
    y = torch.randn_like(model(x))
    kron = kron_factors(model, "regression", batches(x, y), kfac_approx=kfac_approx, backend=backend)
    truth, slices = exact.ggn(model, "regression", x, y), exact.parameter_slices(model)
    errors = {}
    for name, block in kron.items():
        expected = group_diagonal(truth[slices[name], slices[name]], len(block.B) if block.B.ndim == 3 else 1)
        errors[name] = relative_error(block.to_dense(), expected)
    return errors


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("backend", "case"), covered(LINEAR_CASES))
def test_exact_in_its_setting(backend, case, setting):
    errors = errors_on_linear(case, setting, setting, backend)
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("backend", "case"), covered(LINEAR_CASES))
def test_fails_in_the_other_setting(backend, case, setting):
    other = {"expand": "reduce", "reduce": "expand"}[setting]
    errors = errors_on_linear(case, setting, other, backend)
    weights = {name: error for name, error in errors.items() if "bias" not in name}
    assert min(weights.values()) > 1e-2, errors


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize(("backend", "case"), covered(CASES))
def test_full_and_diag_equal_the_oracle(backend, case, structure, curvature):
    model, x, y = case.make()
    la = Laplace(model, case.likelihood, hessian_structure=structure, curvature=curvature, backend=backend)
    la.fit(batches(x, y))
    truth = {"ggn": exact.ggn, "ef": exact.empirical_fisher}[curvature](model, case.likelihood, x, y)
    close(la.H.to_dense(), truth if structure == "full" else truth.diagonal().diag())


@pytest.mark.parametrize(("backend", "case"), covered(WIDE_RESNETS))
def test_diag_of_wide_resnets_equals_the_oracle(backend, case):
    """From the Jacobians of autograd, as the full matrix is too large."""
    model, x, y = case.make()
    la = Laplace(model, case.likelihood, hessian_structure="diag", backend=backend)
    la.fit(batches(x, y))
    J = exact.jacobian(model, x)
    p = model.eval()(x).detach().softmax(1)
    weighted = p.sqrt()[:, :, None] * (J - (p[:, None] @ J))  # squares sum to Jᵀ (diag(p) − p pᵀ) J
    close(la.H.values, weighted.square().sum((0, 1)))


@pytest.mark.parametrize(("backend", "case"), covered([*CASES, *WIDE_RESNETS]))
def test_jacobians_equal_autograd(backend, case):
    model, x, _ = case.make()
    J, f = jacobians(model, x, backend=backend)
    model.eval()
    torch.testing.assert_close(f, model(x).detach().reshape(len(x), -1))
    close(J, exact.jacobian(model, x))


CURVLINOPS_IS_RIGHT = ["mlp", "mlp-regression", "cnn", "residual-blocks", "wide-resnet-none"]
"""Linear and Conv2d without groups and circular padding, each called once; the other parameters are left out there."""


@pytest.mark.parametrize("kfac_approx", SETTINGS)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("case", [c for c in [*CASES, *WIDE_RESNETS] if c.name in CURVLINOPS_IS_RIGHT], ids=str)
def test_factors_equal_those_of_curvlinops(case, backend, kfac_approx):
    """As products with vectors; its MSE has twice our Hessian."""
    model, x, y = case.make()
    kron = kron_factors(model, case.likelihood, [(x, y)], kfac_approx=kfac_approx, backend=backend)
    layers = {n: m for n, m in model.eval().named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    blocks = {m.weight: kron[f"{n}.weight"] for n, m in layers.items()}
    loss, scale = (nn.MSELoss, 0.5) if case.likelihood == "regression" else (nn.CrossEntropyLoss, 1.0)
    theirs = curvlinops.KFACLinearOperator(
        model,
        loss(reduction="sum"),
        list(blocks),
        [(x, y)],
        fisher_type="type-2",
        kfac_approx=kfac_approx,
        check_deterministic=False,
    )
    vectors = [torch.randn(p.shape[0], p[0].numel(), dtype=p.dtype) for p in blocks]
    ours = [block.B @ v @ block.A for block, v in zip(blocks.values(), vectors, strict=True)]
    close(torch.cat([v.flatten() for v in ours]), theirs @ torch.cat([v.flatten() for v in vectors]) * scale)


# ------------------------------------------------------------------ the exact error


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        pytest.param(backend, case, id=f"{backend}-{case}")
        for backend, case in itertools.product(BACKEND_NAMES, [*CASES, *LINEAR_CASES, *WIDE_RESNETS])
        if refusal(backend, case) is not None
    ],
)
def test_what_is_not_covered_is_refused(backend, case):
    if isinstance(case, LinearCase):
        model, x, likelihood = double(case.make_model("reduce")), case.make_x(), "regression"
        y = torch.randn_like(model(x))
    else:
        (model, x, y), likelihood = case.make(), case.likelihood
    before = snapshot(model)
    la = Laplace(model, likelihood, backend=backend)
    for attempt in (lambda: la.check(x), lambda: la.fit([(x, y)])):
        with pytest.raises(UnsupportedParameterError, match=refusal(backend, case)):
            attempt()
    assert_as_found(model, before)


# ------------------------------------------------------------------ hygiene


def snapshot(model):
    modules = list(model.modules())
    return {
        "modules": [id(m) for m in modules],
        "modes": [m.training for m in modules],
        "attributes": [sorted(vars(m)) for m in modules],
        "in place": [getattr(m, "inplace", None) for m in modules],
        "hooks": [[len(v) for k, v in sorted(vars(m).items()) if k.endswith("_hooks")] for m in modules],
        "full hooks": [m._is_full_backward_hook for m in modules],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "parameters": [id(p) for p in model.parameters()],
        "parameters' attributes": [sorted(vars(p)) for p in model.parameters()],
        "grads": [id(p.grad) for p in model.parameters()],
        "tensor hooks": [p._backward_hooks for p in model.parameters()],
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "grad values": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "rng": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_as_found(model, before):
    after = snapshot(model)
    assert before.keys() == after.keys()
    for what in before:
        assert flat(after[what]) == flat(before[what]), what


def flat(value):
    """A snapshot's entry with its tensors as lists, so that == compares it."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    return [flat(item) for item in value] if isinstance(value, list) else value


def in_use(case):
    """A case's model as a user may have it: modes mixed, a gradient kept, an input that requires grad."""
    model, x, y = case.make()
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    return model, x, y


@pytest.mark.parametrize("curvature", ["ggn", "ggn_mc", "ef"])
@pytest.mark.parametrize(("backend", "case"), covered([*CASES, *WIDE_RESNETS[1:2]]))
def test_leaves_the_model_as_found(backend, case, curvature):
    model, x, y = in_use(case)
    before = snapshot(model)
    Laplace(model, case.likelihood, curvature=curvature, backend=backend).fit([(x, y)])
    assert_as_found(model, before)


class FailureInTheMiddleError(Exception):
    """Raised by the tests."""


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        raise FailureInTheMiddleError


@contextmanager
def failing(model, where):
    """Make the last module raise in the forward, or the gradient of its output in the backward."""
    last = [m for m in model.modules() if not list(m.children())][-1]

    def hook(module, arguments, output):
        if where == "forward":
            raise FailureInTheMiddleError
        return FailsBackward.apply(output)

    handle = last.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


HYGIENE_CASES = [c for c in CASES if c.name in ("cnn", "residual-blocks", "scalars-and-norms", "sequence-conv1d")]


def fail_in_the_middle(model, case, backend, x, y, where):
    la = Laplace(model, case.likelihood, backend=backend)
    if where == "labels":
        bad = torch.full_like(y, 7)
        with pytest.raises(InvalidBatchError):
            la.fit([(x, y), (x, bad)])
    else:
        with failing(model, where), pytest.raises(FailureInTheMiddleError):
            la.fit([(x[:1], y[:1])])


@pytest.mark.parametrize("where", ["labels", "forward", "backward"])
@pytest.mark.parametrize(("backend", "case"), covered(HYGIENE_CASES))
def test_leaves_the_model_as_found_after_a_failure(backend, case, where):
    model, x, y = in_use(case)
    before = snapshot(model)
    fail_in_the_middle(model, case, backend, x, y, where)
    assert_as_found(model, before)


@pytest.mark.parametrize("order", list(itertools.permutations(BACKEND_NAMES)), ids="-".join)
@pytest.mark.parametrize("case", HYGIENE_CASES, ids=str)
def test_backends_follow_each_other_in_any_order(case, order):
    model, x, y = in_use(case)
    before = snapshot(model)
    truth = kron_factors(model, case.likelihood, [(x, y)]).to_dense()
    for backend in order:
        fail_in_the_middle(model, case, backend, x, y, "backward")
        close(kron_factors(model, case.likelihood, [(x, y)], backend=backend).to_dense(), truth)
        assert_as_found(model, before)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_gradient_of_the_input_is_left_alone(backend):
    model, x, y = next(c for c in CASES if c.name == "cnn").make()
    x.requires_grad_()
    Laplace(model, "classification", backend=backend).fit([(x, y)])
    assert x.grad is None
    assert len(x) == N
