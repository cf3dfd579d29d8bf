"""Inputs and models whose types do not go together: one sentence of ours, with both types and the mend, wherever a model is run."""

import pytest
import torch
from torch import nn

from laplace_ws import InvalidBatchError, Laplace, kron_factors, marglik_training
from laplace_ws.curvature import jacobians
from laplace_ws.curvature.inputs import call_model


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 2, batch_first=True)

    def forward(self, x):
        return self.lstm(x[:, None])[0][:, 0]


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        return x @ self.weight


class Doubles(nn.Linear):
    def forward(self, x):
        return super().forward(x.double())


def image_net():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 3))


def images():
    return torch.randint(0, 255, (4, 1, 3, 3))


NETS = {
    "linear": lambda: nn.Linear(3, 2),
    "product": Product,
    "recurrent": Recurrent,
    "layer norm": lambda: nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)),
    "batch norm": lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)),
    "prelu": nn.PReLU,
}
TYPES = [torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool]
SMALL = {"n_epochs": 1, "n_hypersteps": 0, "progress_bar": False}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", NETS)
def test_inputs_of_another_type(name, dtype):
    model, x = NETS[name]().eval(), torch.ones(4, 3).to(dtype)
    mend = "one of them" if dtype.is_floating_point else "the inputs"
    says = rf"the inputs are {dtype} and the model's parameters torch.float32; convert {mend}, for example by x.to\(torch.float32\)"
    with pytest.raises(InvalidBatchError, match=says):
        call_model(model, x)


@pytest.mark.parametrize("backend", ["native", "asdl", "backpack"])
@pytest.mark.parametrize(
    ("dtype", "model_dtype"),
    [(torch.float32, torch.float64), (torch.float16, torch.float32), (torch.uint8, torch.float32), (torch.int64, torch.float64)],
)  # fmt: skip
def test_every_pass_says_it(dtype, model_dtype, backend):
    """In a first batch, in a later one, in predictions of both kinds, and in training."""
    model = image_net().to(model_dtype)
    x, y, fits = images().to(dtype), torch.tensor([0, 1, 2, 0]), images().to(model_dtype)
    la = Laplace(model, "classification", backend=backend)
    la.fit([(fits, y)])
    for run in (
        lambda: la.fit([(x, y)]),
        lambda: la.fit([(fits, y), (x, y)]),
        lambda: kron_factors(model, "classification", [(x, y)], backend=backend),
        lambda: jacobians(model, x, backend=backend),
        lambda: la(x),
        lambda: la(x, pred_type="nn"),
        lambda: la.functional_samples(x),
        lambda: la.optimize_prior_precision("gridsearch", val_loader=[(x, y)]),
        lambda: Laplace(model, "classification", hessian_structure="lowrank").fit([(x, y)]),
        lambda: marglik_training(model, [(x, y)], backend=backend, **SMALL),
        lambda: marglik_training(model, [(fits, y), (x, y)], backend=backend, **SMALL),
    ):
        with pytest.raises(
            InvalidBatchError, match=rf"the inputs are {dtype} and the model's parameters {model_dtype}; convert"
        ):
            run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8, torch.bool])
def test_indices_must_be_whole_numbers(dtype):
    model = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 2))
    with pytest.raises(
        InvalidBatchError,
        match=rf"the inputs are {dtype}, but the model looks them up .* takes torch.int64; .* x.long\(\)",
    ):
        Laplace(model, "classification").fit([(torch.ones(4, 3).to(dtype), torch.zeros(4).long())])


def test_whole_numbers_are_not_blamed_where_they_are_indices():
    model = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 2).double())
    says = r"the parameters of Sequential are torch.float32 and torch.float64, .*; convert them .* model.to\(torch.float32\)"
    with pytest.raises(InvalidBatchError, match=says):
        call_model(model, torch.ones(4, 3).long())


def test_types_that_meet_within_the_model_are_the_models_own_matter():
    with pytest.raises(
        InvalidBatchError, match=r"types that do not go together meet in the forward pass of Doubles \(mat1 and mat2"
    ):
        call_model(Doubles(3, 2), torch.ones(4, 3))


def test_types_that_torch_converts_are_welcome():
    x = torch.ones(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float16, torch.bfloat16):
            call_model(nn.Linear(3, 2), x.to(dtype))

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.scale

    for dtype in (torch.float16, torch.float64, torch.uint8):
        call_model(Scale(), x.to(dtype))


def test_errors_about_something_else_say_nothing_of_types():
    with pytest.raises(InvalidBatchError, match=r"Linear cannot be run on inputs \(4, 5\) of torch.float32"):
        call_model(nn.Linear(3, 2), torch.ones(4, 5))
