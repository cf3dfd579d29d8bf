"""Which parameters are in the reduce setting, what "auto" makes of it, and factors that vanish."""

import warnings

import pytest
import torch
from cases import CASES
from nets import VisionTransformer
from torch import nn

from laplace_ws import CurvatureWarning, Laplace, kron_factors
from laplace_ws.curvature import exact

BACKENDS = ["native", "asdl", "backpack"]


def images(n=6):
    return torch.randn(n, 1, 6, 6, dtype=torch.float64), torch.arange(n) % 3


def approximations(model, x, y, **options):
    kron = kron_factors(model.double(), "classification", [(x, y)], **options)
    return {name: block.approx for name, block in kron.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nonlinearity_before_the_mean_decides(backend):
    """The last convolution is averaged with nothing nonlinear behind it, the first is not; where nothing is shared the two are equal."""
    layers = [nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    found = approximations(nn.Sequential(*layers), *images(), backend=backend)
    assert found["0.weight"] == "expand"
    assert found["2.weight"] == "reduce"
    assert found["5.weight"] == "reduce"
    assert {found[name] for name in found if name.endswith("bias")} == {"reduce"}  # exact on any network
    assert set(approximations(nn.Sequential(*layers), *images(), backend=backend, kfac_approx="expand").values()) == {
        "expand"
    }


def test_positions_that_are_weighted_are_not_averaged():
    class Weighted(nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.layer, self.weights = nn.Linear(3, 3), weights

        def forward(self, x):
            return (self.layer(x) * self.weights[:, None]).sum(1)

    x, y = torch.randn(6, 4, 3, dtype=torch.float64), torch.arange(6) % 3
    assert approximations(Weighted(torch.full((4,), 0.5)), x, y)["layer.weight"] == "reduce"
    assert approximations(Weighted(torch.tensor([0.5, 0.5, 0.5, 0.6])), x, y)["layer.weight"] == "expand"


def test_a_weight_used_twice_is_judged_by_all_its_uses():
    class Twice(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.layer, self.factor = nn.Linear(3, 3, bias=False), factor

        def forward(self, x):
            return self.layer(x[:, 0]) + self.factor * self.layer(x[:, 1])

    x, y = torch.randn(6, 2, 3, dtype=torch.float64), torch.arange(6) % 3
    assert approximations(Twice(1.0), x, y) == {"layer.weight": "reduce"}
    assert approximations(Twice(0.5), x, y) == {"layer.weight": "expand"}


def test_a_transformer_is_not_in_the_reduce_setting_for_its_output_is_one_row():
    model = VisionTransformer()
    x, y = next(case for case in CASES if case.name == "vision-transformer").make()[1:]
    found = approximations(model, x, y)
    shared = [name for name, approx in found.items() if approx == "expand"]
    assert any("weight" in name for name in shared)


def test_graphs_whose_nodes_are_summed():
    case = next(c for c in CASES if c.name == "message-passing")
    model, x, y = case.make()
    found = {name: b.approx for name, b in kron_factors(model, case.likelihood, [(x, y)]).items() if b.A is not None}
    assert set(found.values()) == {"expand", "reduce"}


class Candidates(nn.Module):
    """One score for each of two candidates, by one body: a softmax over separate positions."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.body(x).tanh()).squeeze(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_factor_that_vanishes_is_warned_of_by_name(backend, dtype):
    model = Candidates().to(dtype)
    x, y = torch.randn(8, 2, 3, dtype=dtype), torch.arange(8) % 2
    with pytest.warns(CurvatureWarning, match=r"no curvature for 'head\.weight'.*\{\"head\.weight\": \"expand\"\}"):
        kron = kron_factors(model, "classification", [(x, y)], kfac_approx="reduce", backend=backend)
    exact_block = exact.ggn(model, "classification", x, y)
    assert kron["head.weight"].to_dense().norm() < 1e-6 * exact_block.norm()
    with warnings.catch_warnings():
        warnings.simplefilter("error", CurvatureWarning)
        kron = kron_factors(model, "classification", [(x, y)], backend=backend)  # "auto"
    assert kron["head.weight"].to_dense().norm() > 1e-2


def test_no_warning_where_gradients_are_zero_or_do_not_cancel():
    model, (x, y) = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).double(), images()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # dead
    with warnings.catch_warnings():
        warnings.simplefilter("error", CurvatureWarning)
        kron_factors(model, "classification", [(x, y)], kfac_approx="reduce")
        kron_factors(CASES[0].make()[0], CASES[0].likelihood, [CASES[0].make()[1:]], kfac_approx="reduce")


def test_fits_by_different_approximations_do_not_add_up():
    """As from a file of an earlier version, which does not say what "auto" was."""
    layers = [nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)]
    model, data = nn.Sequential(*layers).double(), [images()]
    la = Laplace(model, "classification")
    la.fit(data)
    one, other = (kron_factors(model, "classification", data, kfac_approx=approx) for approx in ("expand", "reduce"))
    with pytest.raises(ValueError, match="by K-FAC-expand and by K-FAC-reduce do not add up"):
        _ = one + other
    state = la.state_dict()
    for block in state["H"].values():
        del block["approx"]
    la.load_state_dict(state)
    with pytest.raises(ValueError, match="by an approximation that is not known and by K-FAC-expand do not add up"):
        la.fit(data, override=False)
    assert la.n_data == 6
