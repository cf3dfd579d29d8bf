"""The simulated device catches what it is for, and how often a fit waits for its device."""

import copy
import warnings

import pytest
import second_device
import torch
from cases import CASES
from torch import nn

import laplace_ws
from laplace_ws import Laplace, kron_factors


@pytest.fixture(autouse=True)
def _needs_the_device(request):
    if request.config.getoption("device") != second_device.NAME:
        pytest.skip(f"needs --device {second_device.NAME}")


def in_the_package(code: str, **names):
    """The value of an expression, evaluated as if a file of the package held it."""
    return eval(compile(code, f"{laplace_ws.__path__[0]}/somewhere.py", "eval"), {"torch": torch, **names})


def test_what_a_test_makes_is_on_the_device_and_what_the_package_makes_is_not():
    made = [torch.randn(2), torch.arange(3), torch.tensor([1, 2]), nn.Linear(2, 2).weight, torch.Generator()]
    assert {value.device.type for value in made} == {second_device.NAME}
    assert in_the_package("torch.zeros(2)").device.type == "cpu"
    assert in_the_package("make()", make=lambda: torch.zeros(2)).device.type == second_device.NAME
    assert in_the_package("torch.Generator()").device.type == "cpu"


@pytest.mark.parametrize(
    "code", ["x + torch.ones(3)", "torch.ones(3).add_(x)", "torch.ones(3)[i]", "torch.cat([x, torch.ones(1)])"]
)
def test_tensors_of_two_devices_do_not_meet(code):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        in_the_package(code, x=torch.randn(3), i=torch.tensor([0, 1]))


@pytest.mark.parametrize("code", ["x + torch.tensor(1.0)", "x[torch.tensor([0, 1])]", "x.copy_(torch.ones(3))"])
def test_where_they_may_meet(code):
    assert in_the_package(code, x=torch.randn(3)).device.type == second_device.NAME


@pytest.mark.parametrize(
    "code",
    [
        "torch.randn(2, device=x.device, generator=torch.Generator())",
        "torch.randperm(2, generator=torch.Generator(x.device))",
    ],
)
def test_a_draw_needs_a_generator_of_its_device(code):
    with pytest.raises(RuntimeError, match="device type for generator"):
        in_the_package(code, x=torch.randn(3))


@pytest.mark.parametrize(
    ("code", "n_waits"),
    [
        ("x.sum().item()", 1),
        ("x.tolist()", 1),
        ("x.cpu()", 1),
        ("bool(x[0] > 0)", 1),
        ("x[x > 0]", 1),
        ("x.exp() + 1", 0),
    ],
)
def test_waits_are_counted(code, n_waits):
    x = torch.ones(3)
    with second_device.counted() as counted:
        in_the_package(code, x=x)
    assert second_device.waits(counted) == n_waits


def test_numbers_are_those_of_the_cpu():
    torch.manual_seed(0)
    there = torch.randn(3), nn.Linear(2, 2).weight.detach()
    torch.manual_seed(0)
    here = in_the_package("torch.randn(3), Linear(2, 2, device='cpu').weight.detach()", Linear=nn.Linear)
    for a, b in zip(there, here, strict=True):
        assert torch.equal(a.cpu(), b)


def test_models_are_copied_cast_and_saved(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    twin = copy.deepcopy(model)
    assert twin[0].weight is twin[1].weight
    assert twin[0].weight is not model[0].weight
    twin.double()
    assert twin[0].weight is twin[1].weight
    torch.testing.assert_close(twin[0].weight.float(), model[0].weight)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for location in ("cpu", second_device.NAME):
        state = torch.load(tmp_path / "model.pt", map_location=location, weights_only=True)
        assert state["0.weight"].device.type == location


# ------------------------------------------------------------------ waits of a fit

WAITS = {
    "mlp": {"ef": 2, "ggn_mc": 2, "ggn": 6},
    "mlp-regression": {"ef": 1, "ggn_mc": 1, "ggn": 3},
}
"""For one further batch: one for the negative log likelihood, one for the range of the labels; exact columns take two to find
out which are not zero, and with a softmax one more each (here two)."""


def waits_of_a_further_batch(fit, x, y):
    """A fit of three batches has them once more than one of two; the first is checked against autograd."""
    totals = []
    for n_batches in (2, 3):
        with second_device.counted() as counted:
            fit([(x, y)] * n_batches)
        totals.append(second_device.waits(counted))
    return totals[1] - totals[0]


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize(("name", "curvature"), [(name, c) for name, of in WAITS.items() for c in of])
def test_a_further_batch_waits_no_more_than_it_did(name, curvature, kfac_approx):
    case = next(case for case in CASES if case.name == name)
    model, x, y = case.make()
    options = {"curvature": curvature, "kfac_approx": kfac_approx, "backend": "native"}
    assert (
        waits_of_a_further_batch(lambda data: kron_factors(model, case.likelihood, data, **options), x, y)
        <= WAITS[name][curvature]
    )
    la = Laplace(model, case.likelihood, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert waits_of_a_further_batch(la.fit, x, y) <= WAITS[name][curvature]
